"""Which activations a block keeps for its backward pass and which it computes again, block by block.

- ``none`` keeps all that autograd saves; a frozen block saves less than an active one, because the gradient of a
  frozen linear layer's weight, for which its input would be needed, is never computed.
- ``full`` keeps the block's input alone (Chen et al., arXiv 1604.06174).
- ``selective`` keeps the outputs of matrix products and of attention, and computes the cheap operators between
  them again. So it does the products of a mixture's experts, whose outputs some models change in place.
- ``auto`` chooses one of these for each block in each period: what fits and computes least again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.attention.varlen  # registers its operator
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lisa_dist.config import UserError

KINDS = ("none", "selective", "full")
MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
ATTENTION_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
ATTENTION = {getattr(torch.ops.aten, name).default for name in ATTENTION_NAMES if hasattr(torch.ops.aten, name)}
ATTENTION.add(torch.ops.torch_attn._varlen_attn.default)
OPERATIONS_PER_BYTE = 200  # what a GPU computes while it moves a byte (A100: 312 TFLOP/s to 1.6 TB/s)


def set_checkpointing(block: nn.Module, kind: str) -> None:
    """Make a block keep the activations of ``kind`` from its next forward pass on.

    transformers checkpoints a block's forward, so FSDP2's hooks stay outside; 5.17 still its call, so they run again.

    Raises:
        UserError: the model's blocks can't be checkpointed.
    """
    if not hasattr(block, "gradient_checkpointing"):
        raise UserError(
            f"parallel.activation_checkpointing={kind}: {type(block).__name__} can't be checkpointed; set it to none"
        )
    flagged: Any = block
    flagged.gradient_checkpointing = kind != "none"
    if kind == "full":
        flagged._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    elif kind == "selective":
        linears = tuple(name for name, part in block.named_modules() if isinstance(part, nn.Linear))
        contexts = functools.partial(_selective_contexts, linears)
        flagged._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)


@contextmanager
def inputs_alone_kept(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks of a model in evaluation keep their inputs alone while the context lasts; dropout stays off.

    transformers checkpoints a block that trains, so each says it does until its forward pass is under way. Blocks that
    can't be checkpointed stay as they are.
    """
    changed: list[Any] = [block for block in blocks if hasattr(block, "gradient_checkpointing")]
    before = [(block.gradient_checkpointing, block.__dict__.get("_gradient_checkpointing_func")) for block in changed]
    for block in changed:
        block.training = block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(_checkpoint_evaluating, block)
    try:
        yield
    finally:
        for block, (flag, function) in zip(changed, before):
            block.training, block.gradient_checkpointing = False, flag
            block._gradient_checkpointing_func = function


def _checkpoint_evaluating(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    def evaluate(*args: Any) -> Any:
        block.training = False
        try:
            return forward(*args)
        finally:
            block.training = True

    return checkpoint(evaluate, *args, use_reentrant=False)


def _selective_contexts(linears: tuple[str, ...]) -> Any:
    # Their number itself may be a symbol of what is compiled for any length, where no graph may depend on it.
    return create_selective_checkpoint_contexts(_KeepProducts(len(linears)))


@dataclass
class _KeepProducts:
    """Keeps matrix products and attention; not the last linear layer's, which nothing in the block needs again."""

    linears: int
    seen: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operator not in MATRIX_PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.seen[context.is_recompute] += 1
        last = self.seen[context.is_recompute] == self.linears
        return CheckpointPolicy.PREFER_RECOMPUTE if last else CheckpointPolicy.MUST_SAVE


@dataclass(frozen=True)
class Cost:
    """What a block costs under a kind of checkpointing."""

    bytes: int  # kept between its forward and its backward pass
    recompute: float  # operations made again; a byte moved counts as ``OPERATIONS_PER_BYTE``


def choose(costs: dict[bool, dict[str, Cost]], counts: dict[bool, int], budget: float) -> dict[bool, list[str]]:
    """Return the kinds of all blocks, active (True) and frozen ones, that fit and compute least again.

    Blocks of a class are interchangeable, so the best is found among the numbers of blocks of each kind: exact.

    Args:
        costs: by class and kind.
        counts: how many blocks there are of each class.
        budget: bytes that may be kept in all.

    Returns:
        A kind for each block of a class; all ``full`` where nothing fits.
    """
    best: tuple[float, float, dict[bool, list[str]]] | None = None
    frozen_options = list(_options(costs[False], counts[False]))
    for active_bytes, active_cost, active_kinds in _options(costs[True], counts[True]):
        for frozen_bytes, frozen_cost, frozen_kinds in frozen_options:
            needed, cost = active_bytes + frozen_bytes, active_cost + frozen_cost
            if needed <= budget and (best is None or (cost, needed) < best[:2]):
                best = cost, needed, {True: active_kinds, False: frozen_kinds}
    return best[2] if best is not None else {key: ["full"] * count for key, count in counts.items()}


def _options(costs: dict[str, Cost], count: int) -> Iterable[tuple[float, float, list[str]]]:
    for plain in range(count + 1):
        for selective in range(count - plain + 1):
            numbers = {"none": plain, "selective": selective, "full": count - plain - selective}
            needed = sum(number * costs[kind].bytes for kind, number in numbers.items())
            cost = sum(number * costs[kind].recompute for kind, number in numbers.items())
            yield needed, cost, [kind for kind in KINDS for _ in range(numbers[kind])]
