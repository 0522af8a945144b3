"""A method trained on ranks, and what the same formulas make of the same weights in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lisa_dist.config import Config
from lisa_dist.method.module import begin_period
from lisa_dist.method.optim.schedule import learning_rate
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.plain_methods import train_by_hand
from tests.support.small_training import GLOBAL_BATCH, build_and_load, full_parameters, make_global_batches

STEPS = 6


def train_on_rank(config: Config, size: int = GLOBAL_BATCH) -> dict[str, Any]:
    """Train and return what the tests compare. Runs on every rank."""
    train_module = build_and_load(config)
    initial = full_parameters(train_module)
    losses, draws, trained = [], [], []
    for step, micro_batches in enumerate(make_global_batches(STEPS, size)):
        if step % config.sampler.period == 0:
            begin_period(train_module, step // config.sampler.period)
            draws.append(list(train_module.active.blocks))
        trained.append(sorted(train_module.optimizer.parameters))
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        losses.append(train_step(train_module, mine, step, STEPS).loss)
    state = train_module.optimizer.moment_tensors()
    return {
        "initial": initial,
        "final": full_parameters(train_module),
        "losses": losses,
        "draws": draws,
        "trained": trained,
        "state_shapes": {name: tuple(tensor.shape) for name, tensor in state.items()},
        "state_bytes": train_module.optimizer.state_bytes(),
        "all_sharded": distributed.world_size() == 1
        or all(isinstance(tensor, DTensor) and tensor.placements[0].is_shard(0) for tensor in state.values()),
    }


def compare(
    result: dict[str, Any],
    model: nn.Module,
    config: Config,
    direction: Any,
    tolerance: float = 1e-3,
    size: int = GLOBAL_BATCH,
) -> None:
    """Train ``model`` by hand from the same weights, on the same parameters, and compare losses and results."""
    missing, unexpected = model.load_state_dict(result["initial"], strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not unexpected and set(missing) <= tied
    rates = [learning_rate(config.scheduler, config.optimizer.lr, step, STEPS) for step in range(STEPS)]
    losses = train_by_hand(
        model,
        lambda step: result["trained"][step],
        make_global_batches(STEPS, size),
        rates,
        config.optimizer.weight_decay,
        config.optimizer.grad_clip,
        direction,
        eps=config.optimizer.eps,
    )
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    reference = dict(model.named_parameters())
    for name, initial in result["initial"].items():
        if name.endswith("c_attn.bias"):
            continue  # a key's bias changes no attention: its gradient is rounding errors, which Adam blows up
        moved = (reference[name] - initial).norm()
        difference = (result["final"][name] - reference[name]).norm()
        assert difference <= tolerance * moved + 1e-7, f"{name}: {difference} of {moved}"
    assert all(not torch.equal(result["final"][name], result["initial"][name]) for name in result["trained"][-1])
