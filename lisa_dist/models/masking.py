"""The attention masks of transformers: narrowed to each packed sample, and under fake tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from transformers import masking_utils

Separation = Literal["positions", "mask"]  # what keeps packed samples apart

PACKED_MASKS = ("eager", "sdpa", "flex_attention")  # kernels whose masks can tell samples apart


@contextmanager
def mask_as_in_training(packing: bool) -> Iterator[None]:
    """Let transformers build an attention mask for fake tensors only where it would for real ones: for packed rows.

    For fake tensors it always does, because their values can't tell it that there is one sequence a row; and with
    a mask it repeats keys and values for every query head.
    """
    always = masking_utils.is_tracing
    if not packing:
        masking_utils.is_tracing = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        masking_utils.is_tracing = always


def takes_positions(model: Any) -> bool:
    """Whether ``model`` or its decoder names ``position_ids`` among the arguments of its forward pass."""
    return any("position_ids" in inspect.signature(part.forward).parameters for part in (model, model.base_model))


def install_position_handling(model: nn.Module, separation: Separation | None) -> None:
    """Let ``model(position_ids=...)`` do what is right whatever the architecture makes of positions.

    Where nothing is packed, and to a model that takes none, they are not given: each counts its tokens in its own way
    (RoBERTa from 2, others not at all), and that is what its weights know. Call it before ``fully_shard`` and after
    :func:`~lisa_dist.objectives.chunked_head.install_loss_head`.

    Args:
        model: a causal language model.
        separation: what keeps packed samples apart; None: nothing is packed. ``mask`` also narrows every mask that the
            model builds to pairs of tokens of one sample, [b, 1, t, t].
    """
    original = model.forward
    passes_positions = separation is not None and takes_positions(model)
    if separation == "positions" and passes_positions:
        return

    @functools.wraps(original)
    def forward(*args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None and passes_positions:
            kwargs["position_ids"] = position_ids
        if position_ids is None or separation != "mask":
            return original(*args, **kwargs)
        with _samples_apart(position_ids):
            return original(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]


@contextmanager
def _samples_apart(position_ids: Tensor) -> Iterator[None]:
    """Narrow every mask that transformers builds meanwhile to pairs of tokens of one sample.

    The masks stay the model's own (causal, windows, the kernel's dtype and polarity); transformers' table of mask
    builders lets one user replace entries of it
    (https://huggingface.co/docs/transformers/main/en/attention_interface#attention-mask-interface).

    Args:
        position_ids: [b, t], a sample begins wherever they do not count on.
    """
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    same_sample = masking_utils.packed_sequence_mask_function(starts.cumsum(-1))
    builders = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    replaced = {name: builders[name] for name in PACKED_MASKS}

    def narrowed(build: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(build)
        def build_narrowed(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> Any:
            kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return build(*args, mask_function=masking_utils.and_masks(mask_function, same_sample), **kwargs)

        return build_narrowed

    for name, build in replaced.items():
        builders[name] = narrowed(build)
    try:
        yield
    finally:
        for name, build in replaced.items():
            builders[name] = build
