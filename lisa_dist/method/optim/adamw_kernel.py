"""AdamW's step of one parameter on a GPU, as a Triton kernel that reads its gradient and leaves it as it is.

What the model computes with, where that is a rounded copy of the parameter, is written in the same pass.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # that a program steps
WARPS = 8


def adamw_step(
    parameter: Tensor,
    copy: Tensor | None,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: Tensor,
    divisor: Tensor,
    left_out: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Step a parameter and its moments where they lie; all tensors are contiguous and on one device, in float32.

    Args:
        parameter: of any shape, as are copy, gradient and moments.
        copy: takes the parameter's new value, rounded to its own dtype; None: there is none.
        gradient: a sum.
        moments: means of the mean gradient and of its square.
        step: of this step, counted from 1, a scalar.
        divisor: what makes a mean of the gradient, a scalar.
        left_out: nothing changes where this scalar is not 0.
        lr: learning rate.
        betas: of the moments.
        eps: added to the root of the mean square.
        weight_decay: times ``lr``, taken off the parameter.
    """
    logarithms = tuple(math.log(beta) if beta > 0 else -math.inf for beta in betas)
    weights = (1 - betas[0], 1 - betas[1])
    count = parameter.numel()
    _adamw[(triton.cdiv(count, ELEMENTS),)](
        *(parameter, parameter if copy is None else copy, gradient, *moments, step, divisor, left_out),
        *(lr, *logarithms, *weights, eps, lr * weight_decay, count, copy is not None),
        ELEMENTS,
        num_warps=WARPS,
    )


@triton.jit
def _adamw(
    parameters: tl.tensor,
    copies: tl.tensor,
    gradients: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    step: tl.tensor,
    divisor: tl.tensor,
    left_out: tl.tensor,
    lr: tl.tensor,
    log_beta1: tl.tensor,
    log_beta2: tl.tensor,
    weight1: tl.tensor,
    weight2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    count: tl.tensor,
    has_copy: tl.constexpr,
    elements: tl.constexpr,
) -> None:
    if tl.load(left_out) != 0:
        return
    steps = tl.load(step).to(tl.float64)  # 1 - beta^step loses digits in float32
    correction1 = (1 - tl.exp(steps * log_beta1)).to(tl.float32)
    correction2 = tl.sqrt(1 - tl.exp(steps * log_beta2)).to(tl.float32)
    places = tl.program_id(0).to(tl.int64) * elements + tl.arange(0, elements)
    there = places < count
    gradient = tl.load(gradients + places, mask=there) / tl.load(divisor)
    mean = tl.load(means + places, mask=there)
    mean += weight1 * (gradient - mean)
    square = tl.load(squares + places, mask=there)
    square += weight2 * (gradient * gradient - square)
    parameter = tl.load(parameters + places, mask=there)
    parameter -= decay * parameter
    parameter -= lr / correction1 * mean / (tl.sqrt(square) / correction2 + eps)
    tl.store(means + places, mean, mask=there)
    tl.store(squares + places, square, mask=there)
    tl.store(parameters + places, parameter, mask=there)
    if has_copy:
        tl.store(copies + places, parameter, mask=there)
