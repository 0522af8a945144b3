"""What weight decay leaves out, against transformers' Trainer, and learning rates by part, against plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from lisa_dist.config import Config, UserError
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.loading import load
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS, PARTS
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.config.updates import UPDATE_CONFIGS
from lisa_dist.method.module import begin_period, build_train_module
from lisa_dist.method.optim.active_optimizer import ActiveOptimizer
from lisa_dist.method.optim.parameter_groups import ParameterGroups, norms_and_biases
from lisa_dist.method.optim.schedule import learning_rate
from lisa_dist.method.updates import build_update
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.families import FAMILIES, tiny_config
from tests.support.plain_methods import mean_loss, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_left_out_as_by_the_trainer_of_transformers(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = {name for name, _ in model.named_parameters()}
    left_out = norms_and_biases(model)
    assert left_out == names - decayed
    assert decayed and (left_out or family == "olmo"), "olmo's norms have no parameters"


class Block(nn.Module):
    """A linear layer with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.input_layernorm = nn.RMSNorm(8)


def decayed_by_a_step(name: str, **settings: Any) -> dict[str, float]:
    """By which factor a step along a gradient of zero shrinks each parameter of a block."""
    model = Block()
    config = OPTIMIZER_CONFIGS[name](**settings)
    groups = ParameterGroups(undecayed=frozenset() if config.decay_norms_and_biases else norms_and_biases(model))
    optimizer = ActiveOptimizer(config, build_update(UPDATE_CONFIGS["full_rank"]()), groups)
    parameters = dict(model.named_parameters())
    optimizer.add_params(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step(dict.fromkeys(PARTS, 0.1))
    return {name: float((parameter.detach() / before[name]).mean()) for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", sorted(OPTIMIZER_CONFIGS))
def test_norms_and_biases_are_decayed_only_where_asked(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    shrunk = decayed_by_a_step(name=name, weight_decay=0.5)
    assert shrunk == pytest.approx({"linear.weight": 0.95, "linear.bias": 1.0, "input_layernorm.weight": 1.0})
    everything = decayed_by_a_step(name=name, weight_decay=0.5, decay_norms_and_biases=True)
    assert everything == pytest.approx(dict.fromkeys(shrunk, 0.95))


STEPS, RATES = 5, {"embeddings": 3e-3, "norm": 0.0, "head": 1e-2}


def config_with_rates(**part_lr: float) -> Config:
    """A configuration of two blocks that all train, with learning rates by part."""
    config = make_config(optimizer={"part_lr": part_lr}, scheduler={"min_lr_ratio": 0.1})
    config.model.architecture["num_hidden_layers"] = 2
    config.sampler = SAMPLER_CONFIGS["all"]()
    return config


def train_with_rates(config: Config) -> dict[str, Any]:
    """Train and return the weights and the recorded learning rates. Runs on every rank."""
    train_module = build_and_load(config)
    initial, lrs = full_parameters(train_module), []
    begin_period(train_module, 0)
    for step, batches in enumerate(make_global_batches(STEPS)):
        mine = batches[distributed.rank() :: distributed.world_size()]
        lrs.append(train_step(train_module, mine, step, STEPS).lr)
    return {"initial": initial, "final": full_parameters(train_module), "lrs": lrs}


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_part_has_its_learning_rate_on_the_schedule_as_groups_of_plain_pytorch_have(world_size: int) -> None:
    config = config_with_rates(**RATES)
    result = run_on_ranks(world_size, train_with_rates, config)[0]
    model = plain_model(config)
    model.load_state_dict(result["initial"])
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    starts = {"model.embed_tokens": "embeddings", "model.norm": "norm", "lm_head": "head"}
    for name, parameter in model.named_parameters():
        part = next((part for start, part in starts.items() if name.startswith(start)), "blocks")
        parts[part].append((name, parameter))
    groups = [
        {"params": [p for name, p in named if ("norm" in name) == undecayed], "part": part}
        | ({"weight_decay": 0.0} if undecayed else {})
        for part, named in parts.items()
        for undecayed in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.optimizer.weight_decay)
    for step, batches in enumerate(make_global_batches(STEPS)):
        mean_loss(model, batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            base = RATES.get(group["part"], config.optimizer.lr)
            group["lr"] = learning_rate(config.scheduler, base, step, STEPS)
        assert result["lrs"][step] == optimizer.param_groups[0]["lr"], "that of the blocks is recorded"
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = (parameter - result["initial"][name]).norm()
        assert (moved == 0) == name.startswith("model.norm")
        assert (result["final"][name] - parameter).norm() <= 1e-3 * moved, name


def test_a_rate_of_the_blocks_replaces_the_common_one_in_the_record_too() -> None:
    config = config_with_rates(blocks=5e-4)
    lrs = run_on_ranks(1, train_with_rates, config)[0]["lrs"]
    assert lrs == [learning_rate(config.scheduler, 5e-4, step, STEPS) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{embedings: 1e-5}", "optimizer.part_lr=embedings: must be one of .*; did you mean embeddings?"),
        ("{head: -1e-5}", "optimizer.part_lr.head=-1e-05: must be at least 0"),
        ("{head: nan}", "optimizer.part_lr.head=nan: must be at least 0"),
        ("{head: fast}", "must be a mapping such as {A:B}, each value a number"),
    ],
)
def test_a_rate_of_no_part_or_that_is_none_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load([f"optimizer.part_lr={override}"])


def test_tied_weights_have_the_rate_of_the_embeddings_and_no_other() -> None:
    config = config_with_rates(embeddings=1e-5)
    config.model.architecture["tie_word_embeddings"] = True
    module = run_on_ranks(1, rates_of_a_step, config)[0]
    assert module["model.embed_tokens.weight"] == 1e-5
    for rates in ({"head": 1e-5}, {"embeddings": 1e-5, "head": 2e-5}):
        config.optimizer.part_lr = rates
        with pytest.raises(UserError, match=r"optimizer\.part_lr\.head=.*ties its head to its embeddings"):
            build_train_module(config)
    config.optimizer.part_lr = {"embeddings": 1e-5, "head": 1e-5}
    config.optimizer.check_tied(True)


def rates_of_a_step(config: Config) -> dict[str, float]:
    """The learning rate of each parameter, on a schedule that is constant. Runs on every rank."""
    config.scheduler.name, config.scheduler.warmup_steps = "constant", 0
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    batches = make_global_batches(1)[0]
    before = full_parameters(train_module)
    train_step(train_module, batches, 0, STEPS)
    after = full_parameters(train_module)
    # The first step of AdamW moves every element that has a gradient by the learning rate.
    return {name: float(f"{(after[name] - before[name]).abs().median():.1e}") for name in before}


def test_rates_of_what_does_not_train_are_named() -> None:
    config = load(["optimizer.part_lr={head: 1e-5, norm: 1e-6}", "always_active.head=false"])
    said = options_without_effect(config, 1)
    assert [line for line in said if "part_lr" in line] == [
        "optimizer.part_lr.head=1e-05: has no effect, always_active.head is false"
    ]
    everything = load(["optimizer.part_lr={blocks: 1e-5, embeddings: 1e-5, norm: 1e-5, head: 1e-5}"])
    assert any(line.startswith("optimizer.lr=") for line in options_without_effect(everything, 1))
