"""Linear layers that read the same hidden states, whose gradient is then one sum.

Autograd adds up what each layer gives to the gradient of their input, a pass over two tensors and a third for each sum.
Here a matrix product adds to the sum where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def join_linears(layers: Sequence[nn.Module]) -> bool:
    """Let layers that are called one after the other with one input run together, at the call of the first.

    Each is called as before, so that its hooks fire. Layers of another kind than ``nn.Linear`` (with adapters,
    quantised) are left as they are, all of them.

    Args:
        layers: in the order in which they are called.

    Returns:
        Whether they are joined.
    """
    if any(type(layer) is not nn.Linear or "forward" in vars(layer) for layer in layers):
        return False
    waiting: dict[int, tuple[Tensor, Tensor]] = {}  # the input and the output of each layer that is not called yet

    def forward(place: int) -> Callable[[Tensor], Tensor]:
        def run(hidden: Tensor) -> Tensor:
            if place == 0:
                parameters: list[Any] = [one for layer in layers for one in (layer.weight, layer.bias)]
                outputs = _JoinedLinears.apply(hidden, *parameters)
                waiting.update((key, (hidden, output)) for key, output in enumerate(outputs))
            given, output = waiting.pop(place)
            assert given is hidden, "joined layers have one input"
            return output

        return run

    for place, layer in enumerate(layers):
        layer.forward = forward(place)  # type: ignore[method-assign]
    return True


class _JoinedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """Shapes: hidden [..., D], parameters [V, D] and [V] or None for each layer; returns each layer's [..., V]."""
        weights, biases = parameters[::2], parameters[1::2]
        trains = any(ctx.needs_input_grad[1::2])
        ctx.save_for_backward(hidden if trains else None, *weights)
        return tuple(F.linear(hidden, weight, bias) for weight, bias in zip(weights, biases) if weight is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, *weights = ctx.saved_tensors
        needs_hidden, *needs = ctx.needs_input_grad
        rows = [gradient.flatten(0, -2) for gradient in gradients]
        total: Tensor | None = None
        if needs_hidden:
            total = rows[0] @ weights[0]
            for gradient, weight in zip(rows[1:], weights[1:]):
                total.addmm_(gradient, weight)
            total = total.view(*gradients[0].shape[:-1], -1)
        found: list[Tensor | None] = []
        for gradient, needs_weight, needs_bias in zip(rows, needs[::2], needs[1::2]):
            found.append(gradient.T @ hidden.flatten(0, -2) if needs_weight else None)
            found.append(gradient.sum(0) if needs_bias else None)
        return total, *found
