"""torch.compile, block by block: one graph serves every block of a class, another one the blocks that train."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# Blocks share their code, and each combination of what trains, what is checkpointed and how long rows are is a
# graph of its own; at the limit torch would go on without compiling, or stop where the whole block must be one graph.
GRAPHS_OF_A_BLOCK = 32


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let each block be compiled at its first forward pass, whole: a break in its graph is an error."""
    torch._dynamo.config.recompile_limit = GRAPHS_OF_A_BLOCK
    for block in blocks:
        block.compile(fullgraph=True)
