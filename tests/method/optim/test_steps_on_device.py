"""The optimizer's part of a step: its passes over memory, and a step that is not finite, which changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisa_dist.config.loading import load
from lisa_dist.method.module import TrainModule, begin_period, build_train_module, load_initial_weights
from lisa_dist.method.optim.clipping import clipping_divisor, mean_norms
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.training import loop
from tests.support.ranks import run_on_ranks
from tests.support.small_training import make_config, make_global_batches

BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}
MANY = 50  # elements: more than there are norms of gradients, fewer than any weight has


def build(kind: str, *overrides: str, precision: dict[str, str] = BF16) -> TrainModule:
    """A module in its first period, in a store of that kind. Runs on one rank."""
    config, chosen = make_config(precision=precision), load(list(overrides))
    config.optimizer, config.update = chosen.optimizer, chosen.update
    with mock.patch("lisa_dist.sharding.stay_whole", lambda *_: kind == "resident"):
        train_module = build_train_module(config)
    load_initial_weights(train_module, distributed.device())
    begin_period(train_module, 0)
    return train_module


class Passes(TorchDispatchMode):
    """Counts, in the optimizer's part of a step, the operators that read or write many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.part = ""

    @contextmanager
    def stopwatch(self, part: str) -> Iterator[None]:
        self.part = part
        yield
        self.part = ""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not torch.Tensor and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # a DTensor's operators on its shards come here again
        result = operator(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        moves = any(tensor.numel() > MANY for tensor in tensors) and not operator.is_view
        if self.part == "optimizer" and (moves or operator is torch.ops.aten._local_scalar_dense.default):
            self.counted[operator.overloadpacket.__name__] += 1
        return result


def passes_of_a_step(kind: str, *overrides: str) -> Counter[str]:
    """What the optimizer's part of a second step does. Runs on one rank."""
    train_module = build(kind, *overrides)
    first, second = make_global_batches(2)
    loop.train_step(train_module, first, 0, 2)
    with Passes() as passes:
        loop.train_step(train_module, second, 1, 2, stopwatch=passes.stopwatch)
    passes.counted.pop("detach", None)
    return passes.counted


def test_gradients_are_read_for_their_norm_and_then_by_the_step_alone() -> None:
    groups = 5  # of parameters with one learning rate and one decay: embeddings, norm, head, blocks and their norms
    step = {"_foreach_norm": 1, "_fused_adamw_": groups}
    assert run_on_ranks(1, passes_of_a_step, "resident")[0] == {**step, "_foreach_copy_": 1}
    assert run_on_ranks(1, passes_of_a_step, "sharded")[0] == step


def poisoned(train_module: TrainModule, *rest: Any) -> Any:
    """Gradients of which one element is inf."""
    result = accumulate_gradients(train_module, *rest)
    gradient = next(iter(train_module.optimizer.gradients().values()))
    local_shard(gradient).view(-1)[0] = math.inf
    return result


accumulate_gradients = loop.accumulate_gradients


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
    assert not loop.train_step(train_module, batches[0], 0, 3).skipped
    before = state_of(train_module)
    with mock.patch.object(loop, "accumulate_gradients", poisoned):
        result = loop.train_step(train_module, batches[1], 1, 3)
    assert result.skipped and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
    assert not train_module.optimizer.gradients()
    after = state_of(train_module)
    assert not [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert not loop.train_step(train_module, batches[2], 2, 3).skipped
    assert set(train_module.optimizer.step_counts().values()) == {2}
    assert all(tensor.isfinite().all() for tensor in state_of(train_module).values())


@pytest.mark.parametrize("kind", ["resident", "sharded"])
@pytest.mark.parametrize("override", ["optimizer=adamw", "optimizer=lion", "update=low_rank"])
def test_a_step_that_is_not_finite_changes_nothing(override: str, kind: str) -> None:
    run_on_ranks(1, leave_out, kind, override)


def test_the_divisor_makes_means_and_clips_them() -> None:
    gradients = [torch.tensor([30.0, 0.0]), torch.tensor([[40.0]])]
    norms = mean_norms(gradients, 10.0, [gradients[1:]])
    assert norms.tolist() == [5.0, 4.0] and gradients[0].tolist() == [30.0, 0.0]
    assert clipping_divisor(norms[0], 10.0, 2.5).item() == pytest.approx(20.0), "halved"
    assert clipping_divisor(norms[0], 10.0, 6.0).item() == 10.0
    assert clipping_divisor(norms[0], 10.0, 0.0).item() == 10.0, "unclipped"
