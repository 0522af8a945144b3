"""What this device does at most, measured as the targets are: matrix products in their dtype, and copies."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from lisa_dist.runtime.distributed import now

MATRIX = {"cuda": 8192, "cpu": 512}  # rows and columns: a CPU without units for bf16 takes 0.1 s for this already
COPIED = {"cuda": 2**32, "cpu": 2**27}  # bytes, beyond all caches
FROM_HOST = 2**30  # bytes
REPEATS = {"cuda": 10, "cpu": 2}
TRIES = 3


@functools.cache  # for each line of a sweep they are the same
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return the device's rates, each the best of three tries.

    ``matrix_flops``: operations a second of a large square product in ``dtype``; ``copy_bytes_per_second``: bytes read
    and written by a copy on the device; on a GPU also ``host_to_device_bytes_per_second``, from pinned memory.
    """
    kind, size = device.type, MATRIX[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    found = {"matrix_flops": 2 * size**3 * _rate(functools.partial(torch.mm, left, right, out=product), kind)}
    source = torch.zeros(COPIED[kind], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    found["copy_bytes_per_second"] = 2 * source.nbytes * _rate(lambda: target.copy_(source), kind)
    if kind == "cuda":
        pinned = torch.zeros(FROM_HOST, dtype=torch.uint8).pin_memory()
        rate = _rate(lambda: target[:FROM_HOST].copy_(pinned, non_blocking=True), kind)
        found["host_to_device_bytes_per_second"] = FROM_HOST * rate
    return found


def _rate(action: Callable[[], object], kind: str) -> float:
    """Return how often a second an action is done, on the device, after one that does not count."""
    action()
    seconds = []
    for _ in range(TRIES):
        started = now()
        for _ in range(REPEATS[kind]):
            action()
        seconds.append(now() - started)
    return REPEATS[kind] / min(seconds)
