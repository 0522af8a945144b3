"""What stands in for kernels in a simulation: of liger-kernel 0.8.5, and this program's own.

They allocate, keep, read and write the same bytes, but for what is as small as a norm's weight. The numbers are
meaningless.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SimulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str, in_place: bool
    ) -> Tensor:
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        ctx.in_place = in_place
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, weight, _ = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        into = gradient if ctx.in_place else torch.zeros_like(gradient)
        torch.add(gradient, hidden, out=into)
        return into, torch.empty_like(weight) if ctx.needs_input_grad[1] else None, *(None,) * 4


class SimulatedAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, branch: Tensor | None, residual: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str
    ) -> tuple[Tensor, Tensor]:
        total = residual if branch is None else residual + branch
        ctx.save_for_backward(total, weight, total.new_empty(total.shape[:-1], dtype=torch.float32))
        ctx.adds = branch is not None
        return total, torch.zeros_like(total) if ctx.adds else total.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total, weight, _ = ctx.saved_tensors
        into = torch.addcmul(gradients[0], gradients[1], total, out=gradients[1])
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        return into if ctx.adds else None, into, of_weight, None, None, None


class SimulatedMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return gate.mul_(gradients[0].contiguous()), up.neg_()  # the gradients take the places of the inputs


class SimulatedRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _turned(query), _turned(key)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _turned(gradients[0]), _turned(gradients[1]), *(None,) * 4


def _turned(states: Tensor) -> Tensor:
    return states.transpose(1, 2).contiguous().neg_().transpose(1, 2)
