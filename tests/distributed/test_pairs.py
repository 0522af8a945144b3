"""Every pair of options on real ranks: the numbers are those of plain PyTorch, or the pair is refused.

The rows of a covering array hold every pair of values that is not refused. Where things lie is no matter for the
numbers; what an option does to the numbers is done by hand in one process (``plain_methods``).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.config.updates import UPDATE_CONFIGS
from lisa_dist.method.module import begin_period, build_train_module
from lisa_dist.method.optim.schedule import learning_rate
from lisa_dist.models.quantization import dequantize
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.plain_methods import Batch, PlainAdamW, PlainGaLore, adam, plain_model, train_by_hand
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches

BLOCKS, STEPS, PERIOD = 2, 5, 2
RANK, ALPHA, ADAPTED = 3, 5.0, ["q_proj", "down_proj"]

# The first value of each is the default. Of the samplers that look at nothing but indices, uniform stands for all.
FACTORS: dict[str, list[Any]] = {
    "update": ["lora", "lora_fa", "full_rank", "low_rank"],
    "sampler": ["uniform", "all", "bandit", "gradient", "importance", "outlier", "weighted"],
    "optimizer": ["adamw", "lion", *(["adamw8bit"] if importlib.util.find_spec("torchao") else [])],
    "optimizer_shard": ["replica", "world"],
    "in_backward": [False, True],
    "offload": ["none", "frozen", "all"],
    "state_on_freeze": ["discard", "offload"],
    "quantization": ["none", "int8", "nf4"],
}
DEFAULTS = {key: values[0] for key, values in FACTORS.items()}
Choice = tuple[str, Any]
QUANTIZED: list[Choice] = [("quantization", "int8"), ("quantization", "nf4")]
REFUSED: set[frozenset[Choice]] = {
    frozenset({("optimizer_shard", "world"), ("update", "low_rank")}),
    frozenset({("optimizer_shard", "world"), ("in_backward", True)}),
    frozenset({("optimizer_shard", "world"), ("offload", "all")}),
    frozenset({("in_backward", True), ("update", "low_rank")}),
    *(frozenset({kind, ("update", update)}) for kind in QUANTIZED for update in ("full_rank", "low_rank")),
    *(frozenset({kind, ("sampler", sampler)}) for kind in QUANTIZED for sampler in ("outlier", "weighted")),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": ADAPTED},
    "lora_fa": {"rank": RANK, "alpha": ALPHA, "target_modules": ADAPTED},
    "low_rank": {"rank": RANK, "refresh_every": 100, "scale": 0.5},
    "bandit": {"eta": 3.0},
    "importance": {"suppressed_sets": 2},
    "outlier": {"threshold": 2.0},
    "weighted": {"law": "weight_norm"},
}


def choices(row: dict[str, Any], count: int) -> set[frozenset[Choice]]:
    """The sets of ``count`` choices in a row."""
    return {frozenset(chosen) for chosen in itertools.combinations(row.items(), count)}


@functools.cache
def covering_array(strength: int) -> list[dict[str, Any]]:
    """Rows without a refused pair that hold every set of ``strength`` choices; the best row first, always the same."""
    product = [dict(zip(FACTORS, values)) for values in itertools.product(*FACTORS.values())]
    held = [(row, choices(row, strength)) for row in product if not choices(row, 2) & REFUSED]
    missing = set().union(*(sets for _, sets in held))
    rows = []
    while missing:
        row, sets = max(held, key=lambda candidate: len(candidate[1] & missing))
        rows.append(row)
        missing -= sets
    return rows


def named(row: dict[str, Any]) -> str:
    """What of a row is not the default."""
    return " ".join(f"{key}={value}" for key, value in row.items() if value != DEFAULTS[key]) or "defaults"


def batches_of(ranks: int) -> list[list[Batch]]:
    """The micro-batches of each step: one sequence a rank, which a step in backward needs."""
    return [step[:ranks] for step in make_global_batches(STEPS)]


def make_row(row: dict[str, Any], ranks: int = 2) -> Config:
    """The configuration of a row, in fp32 throughout; two replicas on 4 ranks, and where masters lie apart."""
    config = make_config(parallel={"replicate": 2 if ranks == 4 or row["optimizer_shard"] == "world" else 1})
    config.model.architecture |= {"num_hidden_layers": BLOCKS, "intermediate_size": 96, "vocab_size": 127}
    config.model.quantization = row["quantization"]
    sampler, update = row["sampler"], row["update"]
    config.sampler = dataclasses.replace(
        SAMPLER_CONFIGS[sampler](), period=PERIOD, active_layers=1, seed=2, **SETTINGS.get(sampler, {})
    )
    config.update = dataclasses.replace(UPDATE_CONFIGS[update](), **SETTINGS.get(update, {}))
    config.optimizer = dataclasses.replace(
        OPTIMIZER_CONFIGS[row["optimizer"]](weight_decay=config.optimizer.weight_decay),
        lr=1e-3 if row["optimizer"] == "lion" else 1e-2,
        in_backward=row["in_backward"],
        state_on_freeze=row["state_on_freeze"],
        grad_clip=0.0 if row["in_backward"] else 0.5,
    )
    config.parallel.optimizer_shard, config.parallel.offload = row["optimizer_shard"], row["offload"]
    return config


def train_row(config: Config, steps: int = STEPS) -> dict[str, Any]:
    """Train and return what is compared. Runs on every rank."""
    train_module = build_and_load(config)
    seen: dict[str, Any] = {
        "initial": full_parameters(train_module),
        "losses": [],
        "draws": [],
        "scores": [],
        "trained": [],
    }
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        for step in range(steps):
            mine = [batches_of(distributed.world_size())[step][distributed.rank()]]
            if step % PERIOD == 0:
                begin_period(train_module, step // PERIOD, lambda count, mine=mine: (mine * count)[:count])
                seen["draws"].append(list(train_module.active.blocks))
                seen["scores"].append(train_module.sampler.scores())
            seen["trained"].append(sorted(train_module.optimizer.parameters))
            seen["losses"].append(train_step(train_module, mine, step, STEPS).loss)
    return seen | {"final": full_parameters(train_module)}


def plain_weights(config: Config, result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights from which a run started, those that are quantised as what they stand for."""
    kind, initial = config.model.quantization, result["initial"]
    weights = {name: value for name, value in initial.items() if not name.endswith("_scale")}
    for name, value in weights.items():
        if f"{name}_scale" in initial:
            codes = value.to(torch.int8 if kind == "int8" else torch.uint8)
            weights[name] = dequantize(codes, initial[f"{name}_scale"], kind, torch.float32)
    return weights


def train_plainly(
    config: Config, weights: dict[str, torch.Tensor], trained: list[list[str]], batches: list[list[Batch]]
) -> tuple[nn.Module, list[float]]:
    """Do the same steps by hand, on the same parameters; the model and the losses."""
    update, keeps = config.update.name, config.optimizer.state_on_freeze == "offload"
    model = plain_model(config)
    if update.startswith("lora"):
        model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ADAPTED), model)
        model.requires_grad_(True)  # embeddings, norm and head train here too
    model.load_state_dict(weights)
    galore = PlainGaLore(RANK, SETTINGS["low_rank"]["refresh_every"], SETTINGS["low_rank"]["scale"])

    def direction(optimizer: PlainAdamW, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if update == "lora_fa" and ".lora_B." in name:
            a = weights[name.replace("lora_B", "lora_A")]
            inverse = torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(RANK))
            return adam(optimizer, name, (RANK / ALPHA) ** 2 * gradient @ inverse)
        return galore.in_blocks(optimizer, name, gradient) if update == "low_rank" else adam(optimizer, name, gradient)

    rates = [learning_rate(config.scheduler, config.optimizer.lr, step, STEPS) for step in range(STEPS)]
    decay, clip = config.optimizer.weight_decay, config.optimizer.grad_clip or float("inf")
    lion = config.optimizer.name == "lion"
    losses = train_by_hand(model, lambda step: trained[step], batches, rates, decay, clip, direction, keeps, lion)
    return model, losses


def check_row(row: dict[str, Any], ranks: int) -> None:
    """Compare a row with plain PyTorch, and what its sampler learnt with a run without any other option."""
    config = make_row(row, ranks)
    result = run_on_ranks(ranks, train_row, config)[0]
    weights = plain_weights(config, result)
    model, losses = train_plainly(config, weights, result["trained"], batches_of(ranks))
    assert result["losses"] == pytest.approx(losses, rel=1e-4)
    reference = dict(model.named_parameters())
    trained = set().union(*result["trained"])
    for name in trained:
        moved = (reference[name] - weights[name]).norm()
        difference = (result["final"][name] - reference[name]).norm()
        assert moved > 0 and difference <= 5e-3 * moved, f"{name}: {difference} of {moved}"
    for name in set(result["initial"]) - trained:
        assert torch.equal(result["final"][name], result["initial"][name]), name
    if row["sampler"] not in ("uniform", "all"):
        kept = ("update", "sampler", "optimizer", "quantization")
        if row == DEFAULTS | {key: row[key] for key in kept}:
            return  # it is the run that it would be compared with
        chosen = (row[key] for key in (*kept, "in_backward"))
        draws, scores = first_draws(ranks, *chosen)
        assert result["draws"][: len(draws)] == draws
        for found, expected in zip(result["scores"], scores):
            assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


@functools.cache
def first_draws(
    ranks: int, update: str, sampler: str, optimizer: str, quantization: str, unclipped: bool
) -> tuple[Any, Any]:
    """The draws and scores of the first two periods with all other options at their defaults."""
    row = DEFAULTS | {"update": update, "sampler": sampler, "optimizer": optimizer, "quantization": quantization}
    config = make_row(row, ranks)
    if unclipped:
        config.optimizer.grad_clip = 0.0
    result = run_on_ranks(ranks, train_row, config, PERIOD + 1)[0]
    return result["draws"], result["scores"]


@pytest.mark.parametrize("row", covering_array(2), ids=named)
def test_every_pair_of_options_equals_plain_pytorch(row: dict[str, Any]) -> None:
    check_row(row, ranks=2)


@pytest.mark.soak
def test_every_three_options_equal_plain_pytorch(subtests: pytest.Subtests) -> None:
    for row in covering_array(3):
        with subtests.test(named(row)):
            check_row(row, ranks=4)


def test_exactly_the_other_pairs_are_refused() -> None:
    """Beside each pair the defaults stand, under which quantised weights are allowed."""
    refused = set()
    for (first, values), (second, others) in itertools.combinations(FACTORS.items(), 2):
        for value, other in itertools.product(values, others):
            try:
                check_combinations(make_row(DEFAULTS | {first: value, second: other}))
            except UserError:
                refused.add(frozenset({(first, value), (second, other)}))
    assert refused == REFUSED
    assert all(not choices(row, 2) & REFUSED for row in covering_array(2))


def test_a_row_that_is_refused_is_refused_before_anything_is_built() -> None:
    row = DEFAULTS | {"optimizer_shard": "world", "offload": "all"}
    with pytest.raises(UserError, match=r"parallel\.offload must be none or frozen"):
        build_train_module(make_row(row))
