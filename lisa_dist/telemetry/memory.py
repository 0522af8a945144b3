"""Memory of this rank, as the record shows it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from lisa_dist.distributed import device
from lisa_dist.telemetry.units import GIB


def memory_kind() -> str:
    """What the figures of this module count."""
    if device().type == "cuda":
        return "GPU memory allocated by tensors"
    return "resident memory of the process"


def current_memory_gib() -> float:
    """Return the memory in use now, in GiB: tensors on the GPU, or without one the process' resident set."""
    here = device()
    if here.type == "cuda":
        return torch.cuda.memory_allocated(here) / GIB
    statm = Path("/proc/self/statm")
    if not statm.exists():  # not Linux: the peak is what the system tells
        return peak_memory_gib()
    return int(statm.read_text().split()[1]) * resource.getpagesize() / GIB


def peak_memory_gib() -> float:
    """Return the largest figure so far, in GiB.

    On a GPU since the last :func:`reset_peak_memory`; on a CPU since the process started, imports included.
    """
    here = device()
    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def reset_peak_memory() -> None:
    """Begin a new peak on the GPU; the CPU's cannot be reset."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats(device())


def free_memory_bytes() -> int | None:
    """Return the free memory of this rank's GPU, or of the machine without one; None where the system does not say."""
    here = device()
    if here.type == "cuda":
        return torch.cuda.mem_get_info(here)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
