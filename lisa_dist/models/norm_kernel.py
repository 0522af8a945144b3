"""RMSNorm (arXiv 1910.07467) of a residual stream, with the sums on both sides of it, in Triton kernels.

Forward what a layer adds to the residual is added as the norm reads it; backward the norm's gradient is added to the
residual's as it is written. As operators of their own each of these sums passes over three tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of a program where the norm's weight trains, which sums up their part of its gradient
WARPS = 8


class AddNorm(torch.autograd.Function):
    """The sum of residual and branch, and its norm."""

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor | None, residual: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm.

        Args:
            ctx: of autograd.
            branch: [..., D], contiguous; None: nothing is added, and the sum is the residual itself.
            residual: [..., D], contiguous.
            weight: [D]; the norm is multiplied by it.
            epsilon: added to the mean of squares.
            offset: added to the weight.
            casting: ``llama``: the weight is multiplied in the dtype of the sum; ``gemma``: in float32.
        """
        size = residual.shape[-1]
        total = residual if branch is None else torch.empty_like(residual)
        normed = torch.empty_like(residual)
        scale = torch.empty(residual.shape[:-1], dtype=torch.float32, device=residual.device)
        _forward[(scale.numel(),)](
            *(residual if branch is None else branch.contiguous(), residual, weight, total, normed, scale),
            *(epsilon, offset, size, branch is not None, casting == "gemma", triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
        ctx.save_for_backward(total, weight, scale)
        ctx.adds, ctx.offset, ctx.casting = branch is not None, offset, casting
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the sum for both of its parts; it takes the place of the norm's incoming one."""
        total, weight, scale = ctx.saved_tensors
        of_total, of_normed = (gradient.contiguous() for gradient in gradients)
        size, rows = total.shape[-1], scale.numel()
        trains = ctx.needs_input_grad[2]
        rows_each = ROWS if trains else 1
        programs = triton.cdiv(rows, rows_each)
        parts = torch.empty(programs if trains else 0, size, dtype=torch.float32, device=total.device)
        _backward[(programs,)](
            *(of_total, of_normed, total, weight, scale, parts, ctx.offset, rows, size),
            *(rows_each, trains, ctx.casting == "gemma", triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
        of_weight = parts.sum(0).to(weight.dtype) if trains else None
        return of_normed if ctx.adds else None, of_normed, of_weight, None, None, None


@triton.jit
def _forward(
    branch: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    scale: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    size: tl.constexpr,
    adds: tl.constexpr,
    in_float32: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, columns)
    there = places < size
    places += row * size
    kept = tl.load(residual + places, mask=there, other=0.0)
    if adds:
        kept = (kept.to(tl.float32) + tl.load(branch + places, mask=there, other=0.0).to(tl.float32)).to(kept.dtype)
        tl.store(total + places, kept, mask=there)
    wide = kept.to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + epsilon)
    tl.store(scale + row, root)
    factor = tl.load(weight + tl.arange(0, columns), mask=there, other=0.0)
    if in_float32:
        value = wide * root * (factor.to(tl.float32) + offset)
    else:
        value = (wide * root).to(kept.dtype) * (factor + offset).to(factor.dtype)
    tl.store(normed + places, value, mask=there)


@triton.jit
def _backward(
    of_total: tl.tensor,
    of_normed: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    parts: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    size: tl.constexpr,
    rows_each: tl.constexpr,
    trains: tl.constexpr,
    in_float32: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    row_places = tl.arange(0, columns)
    inside = row_places < size
    factor = tl.load(weight + row_places, mask=inside, other=0.0).to(tl.float32) + offset
    part = tl.zeros((columns,), dtype=tl.float32)
    for index in range(rows_each):
        row = program * rows_each + index
        there = inside & (row < rows)
        places = row * size + row_places
        incoming = tl.load(of_normed + places, mask=there, other=0.0)
        root = tl.load(scale + row, mask=row < rows, other=0.0)
        kept = tl.load(total + places, mask=there, other=0.0)
        unit = kept.to(tl.float32) * root
        if trains:
            rounded = unit if in_float32 else unit.to(kept.dtype).to(tl.float32)
            part += incoming.to(tl.float32) * rounded
        outer = incoming.to(tl.float32) * factor
        value = root * (outer - unit * (tl.sum(outer * unit, 0) / size))
        value += tl.load(of_total + places, mask=there, other=0.0).to(tl.float32)
        tl.store(of_normed + places, value, mask=there)
    if trains:
        tl.store(parts + program * size + row_places, part, mask=inside)
