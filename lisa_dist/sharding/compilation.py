"""torch.compile, block by block: one graph serves every block of a class, another one the blocks that train."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Blocks share their code, and each combination of what trains, what is checkpointed and which inputs need a gradient
# is a graph of its own; at the limit torch would go on without compiling, or stop where a block must be one graph.
GRAPHS_OF_A_BLOCK = 32


def compile_blocks(model: nn.Module, blocks: Iterable[nn.Module], *, lengths_vary: bool) -> None:
    """Let each block be compiled at its first forward pass, whole: a break in its graph is an error.

    It is their forward passes that are compiled, so that what a store does around one stays outside: hooks that gather
    weights, weights that come from host memory. Without gradients (validation, answers) the blocks run as they are:
    those would be further graphs. Call it before the store is built, and when the root's forward is otherwise final.

    Args:
        model: the root, whose forward runs the blocks.
        blocks: of the model.
        lengths_vary: make graphs that serve sequences of any length, where not all have the same.
    """
    torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK
    for block in blocks:
        kind: Any = type(block)
        compiled = torch.compile(
            types.MethodType(_forward_of(kind), block), fullgraph=True, dynamic=True if lengths_vary else None
        )
        block.forward = compiled  # type: ignore[method-assign]
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return original(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return original(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]


@functools.cache
def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward pass of a class of blocks, which checkpoints activations where a block's attributes say so.

    From 5.18 on transformers asks for that in what it makes of the forward that a class has, and there whether it is
    the outermost: under FSDP2, whose class is another one, the forward that is compiled here would not be, and would
    keep what it is to drop. Before, transformers asks in the call, outside of what is compiled.
    """
    if not issubclass(kind, GradientCheckpointingLayer) or "__init_subclass__" not in vars(GradientCheckpointingLayer):
        return kind.forward
    inner: Any = vars(kind.forward)["__wrapped__"]

    def forward(block: Any, *args: Any, **kwargs: Any) -> Any:
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return block._gradient_checkpointing_func(functools.partial(inner, block, **kwargs), *args)
        return inner(block, *args, **kwargs)

    return forward
