"""Where the blocks, the embeddings, the final norm and the head of any decoder are, found by structure."""

from __future__ import annotations

import functools
import inspect
import re
from contextlib import suppress
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest

EMBEDDINGS = "embeddings"
NORM = "norm"
HEAD = "head"


@dataclass(frozen=True)
class LayerMap:
    """The parts of a decoder: the stack of blocks, and the modules outside it.

    Every parameter belongs to exactly one part (``group_of``); weights that the head shares with the embeddings
    belong to the embeddings.
    """

    blocks_path: str  # dotted path of the stack, e.g. model.layers
    blocks: list[nn.Module]
    block_names: list[str]  # e.g. model.layers.3
    embeddings: list[nn.Module]  # token embeddings, and position embeddings where there are any
    embedding_names: list[str]
    norm: list[nn.Module]  # all else that holds parameters: the final norm, projections
    norm_names: list[str]
    head: nn.Module
    head_name: str
    tied: bool  # the head's weight is the embeddings'

    def group_of(self, parameter_name: str) -> str:
        """Return ``block:<i>``, ``embeddings``, ``norm`` or ``head`` for a parameter's dotted name.

        Parameters that were added inside a part later (adapters) belong to that part.
        """
        if parameter_name.startswith(f"{self.blocks_path}."):
            return f"block:{parameter_name.removeprefix(f'{self.blocks_path}.').split('.')[0]}"
        if any(parameter_name.startswith(f"{name}.") for name in self.embedding_names):
            return EMBEDDINGS
        if parameter_name.startswith(f"{self.head_name}."):
            return EMBEDDINGS if self.tied and parameter_name == f"{self.head_name}.weight" else HEAD
        return NORM

    def part_of(self, parameter_name: str) -> str:
        """Return ``blocks``, ``embeddings``, ``norm`` or ``head``: the group without the number of the block."""
        group = self.group_of(parameter_name)
        return group if block_of(group) is None else "blocks"

    def path_in_block(self, parameter_name: str) -> str:
        """Return a parameter's name without its block's: the same for all blocks."""
        return parameter_name.removeprefix(f"{self.blocks_path}.").partition(".")[2]


def block_of(group: str) -> int | None:
    """Return the index of a group ``block:<i>``, None for one outside the blocks."""
    return int(group.removeprefix("block:")) if group.startswith("block:") else None


def find_layers(model: nn.Module, blocks_path: str | None = None) -> LayerMap:
    """Find the parts of ``model``, a causal language model, on any device.

    The stack is the ``nn.ModuleList`` of parameter-bearing members that holds the most parameters and is in no
    other such list; ``blocks_path`` (``model.blocks``) names it by hand. The head is the model's output embeddings;
    embeddings are the ``nn.Embedding`` modules outside the stack.

    Raises:
        UserError: there is no stack, or no head.
    """
    path = _named_stack(model, blocks_path) if blocks_path is not None else _largest_stack(model)
    stack = model.get_submodule(path)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise UserError(f"model.path: {type(model).__name__} has no language-model head, so no loss to train on")
    head_name = next(name for name, module in model.named_modules() if module is head)
    outside = {
        name: module
        for name, module in model.named_modules()
        if name != path and not name.startswith(f"{path}.") and next(module.parameters(recurse=False), None) is not None
    }
    embeddings = {name: module for name, module in outside.items() if isinstance(module, nn.Embedding)}
    within = tuple(f"{name}." for name in [*embeddings, head_name])  # Inkling's embeddings have a norm of their own
    others = (name for name, module in outside.items() if name not in embeddings and module is not head)
    norm = {name: outside[name] for name in others if not name.startswith(within)}
    return LayerMap(
        blocks_path=path,
        blocks=list(stack.children()),
        block_names=[f"{path}.{name}" for name, _ in stack.named_children()],
        embeddings=list(embeddings.values()),
        embedding_names=list(embeddings),
        norm=list(norm.values()),
        norm_names=list(norm),
        head=head,
        head_name=head_name,
        tied=any(getattr(head, "weight", None) is module.weight for module in embeddings.values()),
    )


def linear_layers(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return the linear layers inside a block by their names in it; GPT-2's hold their weight transposed."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@functools.cache
def weights_read(kind: type[nn.Module], *, dtype_too: bool = False) -> frozenset[str]:
    """Return the layers of a module whose weights its code reads itself, as Mamba's does for its kernels on a GPU.

    With ``dtype_too`` also those of which it looks at the weight alone, as at its dtype, or sets its values.
    """
    found: set[str] = set()
    # Of a part of it, weight[...], Bloom's code alone makes use, where slow_but_exact asks for that.
    but = r"\[" if dtype_too else r"\[|\.(?:dtype|device|shape|data)\b"
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        with suppress(OSError, TypeError):  # a class without source
            found.update(re.findall(rf"\bself\.(\w+)\.weight\b(?!{but})", inspect.getsource(base)))
    return frozenset(found)


def _largest_stack(model: nn.Module) -> str:
    """Return the path of the largest of the outermost module lists whose members all hold parameters."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)  # experts within a block
        full = isinstance(module, nn.ModuleList) and all(any(True for _ in part.parameters()) for part in module)
        if full and len(module) and not inside:
            stacks[name] = module
    if not stacks:
        looked_at = ", ".join(name for name, _ in model.named_children()) or "no modules"
        raise UserError(
            f"model.blocks=null: no stack of blocks was found in {type(model).__name__} (looked for a ModuleList "
            f"whose members hold parameters in {looked_at}); name it by hand, e.g. model.blocks=model.layers"
        )
    return max(stacks, key=lambda name: sum(parameter.numel() for parameter in stacks[name].parameters()))


def _named_stack(model: nn.Module, path: str) -> str:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    if path not in lists or not len(list(model.get_submodule(path).children())):
        raise UserError(
            f"model.blocks={path}: is no list of modules of {type(model).__name__}; its lists are "
            f"{', '.join(lists[:5]) or 'none'}{nearest(path, lists)}"
        )
    return path
