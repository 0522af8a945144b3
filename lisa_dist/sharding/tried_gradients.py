"""Whether another way of making a model's passes gives its losses and gradients, tried on a tiny copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_dist.models.tiny_copy import FIRST_PLAIN_TOKEN, VOCABULARY, tiny_copy

ModelPass = Callable[[], tuple[Tensor, float]]  # of one micro-batch: the sum of its losses, and what divides it

TRIED_TOKENS = (21, 13)  # of the tiny copy's micro-batches
ROUNDING = 1e-3  # of the largest gradient of a parameter, in float32; another order of sums gives some 1e-6


def what_differs(
    model: nn.Module, blocks_path: str, way: Callable[[Sequence[ModelPass], Sequence[nn.Module]], Sequence[Tensor]]
) -> str:
    """Return the first parameter whose gradient ``way`` gives otherwise, or ``the loss``; empty where all is equal.

    Args:
        model: as transformers builds it, on any device, without adapters.
        blocks_path: the dotted path of its stack of blocks.
        way: makes forward and backward of the passes through these blocks, all of whose parameters train; returns the
            losses.

    Raises:
        NoTinyCopyError: there is no tiny copy to try.
    """
    small: Any = tiny_copy(model, blocks_path)
    blocks = list(small.get_submodule(blocks_path).children())
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (1, size), generator=generator) for size in TRIED_TOKENS]
    passes = [partial(_tiny_pass, small, tokens) for tokens in ids]
    expected = torch.stack(in_turn(passes))
    gradients = _take_gradients(small)
    losses = torch.stack(list(way(passes, blocks)))
    found = _take_gradients(small)
    differing = [name for name in gradients if not _equal(found.get(name), gradients[name])]
    differing += sorted(found.keys() - gradients.keys())
    return [*differing, *([] if _equal(losses, expected) else ["the loss"]), ""][0]


def in_turn(passes: Sequence[ModelPass]) -> list[Tensor]:
    """Make forward and backward of one pass after the other; return the losses."""
    losses = []
    for run in passes:
        loss, _ = run()
        loss.backward()
        losses.append(loss.detach())
    return losses


def _tiny_pass(model: Any, tokens: Tensor) -> tuple[Tensor, float]:
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum"), 1.0


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def _equal(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and bool((found - expected).abs().max() <= ROUNDING * expected.abs().max())
