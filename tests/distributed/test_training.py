"""The trainer's steps on real ranks against LISA in plain PyTorch."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist import distributed
from lisa_dist.config import Config
from lisa_dist.learner import Learner, begin_period, build_learner, load_initial_weights
from lisa_dist.optim.schedule import learning_rate
from lisa_dist.sampling import build_sampler
from lisa_dist.sharding import storage
from lisa_dist.trainer import train_step
from tests.plain_lisa import train_plainly
from tests.ranks import run_on_ranks

# No size is divisible by two ranks, let alone by four.
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 127,
    "hidden_size": 54,
    "intermediate_size": 101,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
STEPS, PERIOD, GLOBAL_BATCH = 9, 3, 8


def make_config(**changes: Any) -> Config:
    """A configuration in fp32 throughout; ``changes`` are group -> fields."""
    config = Config()
    config.model.architecture = dict(ARCHITECTURE)
    config.model.init = "random"
    config.sampler.period = PERIOD
    config.precision = dataclasses.replace(config.precision, frozen="float32", compute="float32")
    config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.grad_clip = 1e-3, 0.1, 0.5
    config.scheduler.warmup_steps = 2
    for group, fields in changes.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, group), name)
            setattr(getattr(config, group), name, value)
    return config


def make_global_batches(steps: int = STEPS) -> list[list[dict[str, torch.Tensor]]]:
    """Micro-batches of one sequence of unequal lengths, some tokens without loss; as many for each step."""
    generator = torch.Generator().manual_seed(11)
    lengths = random.Random(5)
    batches = []
    for _ in range(steps):
        step = []
        for _ in range(GLOBAL_BATCH):
            length = lengths.randint(3, 17)
            ids = torch.randint(0, 127, (1, length), generator=generator)
            labels = ids.clone()
            labels[:, : lengths.randint(0, length - 2)] = -100
            step.append({"input_ids": ids, "position_ids": torch.arange(length)[None], "labels": labels})
        batches.append(step)
    return batches


def full_parameters(learner: Learner) -> dict[str, torch.Tensor]:
    """All parameters, whole, in fp32. Collective."""
    storage.reshard_all(learner.sharded.module)
    gathered = {}
    for name in learner.sharded.handles:
        parameter = learner.sharded.parameter(name).detach()
        assert isinstance(parameter, DTensor)
        gathered[name] = parameter.full_tensor().float().clone()
    return gathered


def train_on_rank(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """Build, train, and return what the tests compare. Runs on every rank."""
    device = torch.device("cpu")
    learner = build_learner(config)
    load_initial_weights(learner, device)
    initial = full_parameters(learner)
    losses, draws, reduce_dtypes, bytes_counted = [], [], [], []
    for step, micro_batches in enumerate(make_global_batches(steps)):
        if step % config.sampler.period == 0:
            begin_period(learner, step // config.sampler.period)
            draws.append(list(learner.active.blocks))
            groups = {id(group): group for _, group in learner.sharded.handles.values()}
            reduce_dtypes.append({storage.reduce_dtype(group) for group in groups.values()} - {None})
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        losses.append(train_step(learner, mine, step, steps).loss)
        bytes_counted.append(learner.optimizer.state_bytes())
    return {
        "initial": initial,
        "final": full_parameters(learner),
        "losses": losses,
        "draws": draws,
        "reduce_dtypes": reduce_dtypes,
        "optimizer_bytes": bytes_counted,
    }


def train_reference(
    config: Config, initial: dict[str, torch.Tensor], draws: list[list[int]]
) -> tuple[Any, list[float]]:
    fields = dict(config.model.architecture)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.load_state_dict(initial, strict=False)
    ends = [p for name, p in model.named_parameters() if ".layers." not in name]
    rates = [learning_rate(config.scheduler, config.optimizer.lr, step, STEPS) for step in range(STEPS)]
    losses = train_plainly(
        model,
        list(model.model.layers),
        ends,
        make_global_batches(),
        draws,
        PERIOD,
        rates,
        config.optimizer.weight_decay,
        config.optimizer.grad_clip,
    )
    return dict(model.named_parameters()), losses


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_three_periods_equal_plain_pytorch(world_size: int, tied: bool) -> None:
    config = make_config()
    config.model.architecture["tie_word_embeddings"] = tied
    results = run_on_ranks(world_size, train_on_rank, config)
    first = results[0]
    sampler = build_sampler(config.sampler, 5)
    assert first["draws"] == [sampler.draw(period) for period in range(3)]
    assert first["draws"][0] != first["draws"][1], "a seed whose draws differ is needed for this test"
    reference, losses = train_reference(config, first["initial"], first["draws"])
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    for name, parameter in first["final"].items():
        error = (parameter - reference[name]).norm() / reference[name].norm()
        assert error < 1e-5, f"{name}: relative error {error}"
    for other in results[1:]:
        assert other["losses"] == first["losses"] and other["draws"] == first["draws"]
