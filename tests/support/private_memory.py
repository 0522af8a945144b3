"""The private memory that something takes at its peak, measured from outside it."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: larger pieces of memory are mapped alone


def private_bytes() -> int:
    """Memory of this process that no file backs (RssAnon): pages of memory-mapped weights are the page cache's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def give_freed_tensors_back_at_once() -> None:
    """Let only what is in use be counted, not what the allocator keeps. For a process of its own, at its start."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024) == 1


def peak_private_bytes(action: Callable[[], object]) -> int:
    """Call ``action`` and return the peak of private bytes while it ran, above those before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory that is free already would serve, and nothing would be seen
    before, peak, done = private_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, private_bytes())
            time.sleep(0.0005)

    watch = threading.Thread(target=sample)
    watch.start()
    action()
    done.set()
    watch.join()
    return max(peak, private_bytes()) - before  # the last look may have been before the end
