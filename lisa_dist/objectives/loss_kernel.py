"""The cross-entropy of rows of logits, and its gradient where the logits were, in one Triton kernel.

Logits in bfloat16 are read twice and written once, where torch's operators make passes over several copies of them in
float32. The sum of exponentials is kept up while a row is read (arXiv 1805.02867, algorithm 3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192  # of a row that are worked on at a time
WARPS = 16


def cross_entropy_in_place(logits: Tensor, targets: Tensor, scale: float, cap: float | None, gradient: bool) -> Tensor:
    """Return the float32 loss of each row, [rows]; with ``gradient`` its gradient takes the place of the logits.

    Rows whose target is negative have no loss, and a gradient of zero.

    Args:
        logits: the head's product, [rows, V], contiguous.
        targets: int64, [rows].
        scale: logits are multiplied by it.
        cap: then replaced by ``cap * tanh(logits / cap)``; None: not.
        gradient: with respect to ``logits`` as they come.
    """
    rows, words = logits.shape
    assert logits.is_contiguous()
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, words, scale, cap or 1.0, cap is not None, gradient, COLUMNS, num_warps=WARPS
    )
    return losses


def multiply_in_place(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a float32 scalar on its device; it is not touched where that is 1."""
    assert tensor.is_contiguous()
    _multiply[(triton.cdiv(tensor.numel(), COLUMNS),)](tensor, factor, tensor.numel(), COLUMNS, num_warps=WARPS)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _cross_entropy(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    words: tl.constexpr,
    scale: tl.tensor,
    cap: tl.tensor,
    capped: tl.constexpr,
    with_gradient: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # times words it may pass 2^31
    logits += row * words
    target = tl.load(targets + row)
    if target < 0:
        tl.store(losses + row, 0.0)
        if with_gradient:
            for start in range(0, words, columns):
                places = start + tl.arange(0, columns)
                tl.store(logits + places, 0.0, mask=places < words)
        return
    own = tl.load(logits + target).to(tl.float32) * scale
    if capped:
        own = cap * _tanh(own / cap)
    largest, total = float("-inf"), 0.0
    for start in range(0, words, columns):
        places = start + tl.arange(0, columns)
        part = tl.load(logits + places, mask=places < words, other=0.0).to(tl.float32) * scale
        if capped:
            part = cap * _tanh(part / cap)
        part = tl.where(places < words, part, float("-inf"))
        larger = tl.maximum(largest, tl.max(part, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(part - larger), 0)
        largest = larger
    loss = largest + tl.log(total) - own
    tl.store(losses + row, loss)
    if with_gradient:
        # p - 1 at the target, which from a rounded p would have no digits left where p is near 1.
        own_gradient = tl.where(loss < 0.01, -loss * (1 - loss * (0.5 - loss / 6)), tl.exp(-loss) - 1)
        for start in range(0, words, columns):
            places = start + tl.arange(0, columns)
            part = tl.load(logits + places, mask=places < words, other=0.0).to(tl.float32) * scale
            slope = scale
            if capped:
                tangent = _tanh(part / cap)
                part, slope = cap * tangent, scale * (1 - tangent * tangent)
            value = tl.where(places == target, own_gradient, tl.exp(part - largest) / total) * slope
            tl.store(logits + places, value, mask=places < words)


@triton.jit
def _multiply(tensor: tl.tensor, factor: tl.tensor, count: tl.tensor, columns: tl.constexpr) -> None:
    value = tl.load(factor)
    if value != 1.0:
        places = tl.program_id(0).to(tl.int64) * columns + tl.arange(0, columns)
        there = tl.load(tensor + places, mask=places < count)
        tl.store(tensor + places, there * value, mask=places < count)
