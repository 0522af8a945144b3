"""Python's search for garbage, at steps of our choice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collected_when_asked() -> Iterator[None]:
    """Let Python look for garbage in the body only where that calls ``gc.collect``, and only among what is new.

    By itself it would do so on each rank at another time, and every time all ranks would wait for the one. What is
    there before the body, imported modules above all, is left out: it makes each search long and finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
