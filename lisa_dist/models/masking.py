"""Attention masks under fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import masking_utils


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
