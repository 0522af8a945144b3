"""When Python looks for garbage: objects that only refer to each other."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Let Python look for garbage in the body only where that calls ``gc.collect``."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def garbage_collected_when_asked() -> Iterator[None]:
    """Let Python look for garbage in the body only where that calls ``gc.collect``, and only among what is new.

    By itself it would do so on each rank at another time, and every time all ranks would wait for the one. What is
    there before the body, imported modules above all, is left out: it makes each search long and finds nothing.
    Where the caller has left something out already, that stays so, and nothing is added.
    """
    has_frozen = gc.get_freeze_count() > 0
    if not has_frozen:
        gc.collect()
        gc.freeze()
    try:
        with no_garbage_collection():
            yield
    finally:
        if not has_frozen:
            gc.unfreeze()
