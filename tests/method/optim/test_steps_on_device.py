"""The optimizer's part of a step: its passes over memory, and a step that is not finite, which changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisa_dist.method.optim.clipping import clipping_divisor, mean_norms
from lisa_dist.training import loop
from tests.support.left_out import build, leave_out
from tests.support.ranks import run_on_ranks
from tests.support.small_training import make_global_batches

MANY = 50  # elements: more than there are norms of gradients, fewer than any weight has


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


def test_norms_have_the_digits_of_float32_whatever_is_normed() -> None:
    gradients = [torch.full((1000,), 1.0, dtype=torch.bfloat16), torch.ones(7, dtype=torch.bfloat16)]
    assert mean_norms(gradients, 1.0, [[]]).tolist() == [pytest.approx(1007**0.5, rel=1e-6), 0.0]
