"""Memory of this rank, as the record shows it."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

from lisa_dist.runtime.distributed import device
from lisa_dist.runtime.units import GIB

_STATUS = Path("/proc/self/status")


def memory_kind() -> str:
    """What this module counts."""
    if device().type == "cuda":
        return "GPU memory allocated by tensors"
    return "resident memory of the process"


def peak_memory_gib() -> float:
    """Return the most memory in use at a time since :func:`reset_peak_memory`, or since the start, in GiB.

    On a GPU what tensors hold; without one the process' resident set, imports included.
    """
    here = device()
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) / GIB
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def reset_peak_memory() -> None:
    """Begin a new peak with what is in use now; where the system does not allow it, the peak goes on from the start."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats(device())
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5); Linux alone has it


def allocator_retries() -> int | None:
    """Return how often this rank's GPU had no room until the allocator gave back what it kept for later; None on a CPU.

    Each time the host waits for the GPU, and what was given back is asked for anew.
    """
    here = device()
    return int(torch.cuda.memory_stats(here).get("num_alloc_retries", 0)) if here.type == "cuda" else None


def free_memory_bytes() -> int | None:
    """Return the free memory of this rank's GPU, without one what the machine has and this process may take of it.

    None where the system does not say.
    """
    here = device()
    if here.type == "cuda":
        return torch.cuda.mem_get_info(here)[0]
    return free_host_bytes()


def free_host_bytes() -> int | None:
    """Return what the machine has of free memory and this process may take of it; None where it does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    free = int(available.split()[1]) * 1024
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:  # ulimit -v
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        free = min(free, max(0, limit - pages * resource.getpagesize()))
    return free
