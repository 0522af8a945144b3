"""A step that is not finite: what there is before and after it. Runs on one rank, or on a GPU."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch

from lisa_dist.config.loading import load
from lisa_dist.method.module import TrainModule, begin_period, build_train_module, load_initial_weights
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.training import step as step_parts
from tests.support.small_training import make_config, make_global_batches

BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}


def build(kind: str, *overrides: str, precision: dict[str, str] = BF16) -> TrainModule:
    """A module in its first period, in a store of that kind. Runs on one rank."""
    config, chosen = make_config(precision=precision), load(list(overrides))
    config.optimizer, config.update = chosen.optimizer, chosen.update
    with mock.patch("lisa_dist.sharding.stay_whole", lambda *_: kind == "resident"):
        train_module = build_train_module(config)
    load_initial_weights(train_module, distributed.device())
    begin_period(train_module, 0)
    return train_module


def poisoned(train_module: TrainModule, *rest: Any) -> Any:
    """Gradients of which one element is inf."""
    result = accumulate_gradients(train_module, *rest)
    gradient = next(iter(train_module.optimizer.gradients().values()))
    local_shard(gradient).view(-1)[0] = math.inf
    return result


accumulate_gradients = step_parts.accumulate_gradients


def state_of(train_module: TrainModule) -> dict[str, torch.Tensor]:
    """Copies of all weights, moments and whatever an update keeps, of the compute copies and the counts of steps."""
    optimizer, store = train_module.optimizer, train_module.store
    found = {**store.tensors(), **optimizer.moment_tensors()}
    found |= {f"used {name}": store.parameter(name).detach() for name in store.names}
    found |= {f"steps of {name}": torch.tensor(count) for name, count in optimizer.step_counts().items()}
    return {name: local_shard(tensor).clone() for name, tensor in found.items()}


def leave_out(kind: str, *overrides: str) -> None:
    """Make a good step, one that is not finite, and a good one. Runs on one rank."""
    train_module = build(kind, *overrides)
    batches = make_global_batches(3)
    assert not step_parts.train_step(train_module, batches[0], 0, 3).skipped
    before = state_of(train_module)
    with mock.patch.object(step_parts, "accumulate_gradients", poisoned):
        result = step_parts.train_step(train_module, batches[1], 1, 3)
    assert result.skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert not train_module.optimizer.gradients()
    after = state_of(train_module)
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert not step_parts.train_step(train_module, batches[2], 2, 3).skipped
    assert set(train_module.optimizer.step_counts().values()) == {2}
    assert all(tensor.isfinite().all() for tensor in state_of(train_module).values())
