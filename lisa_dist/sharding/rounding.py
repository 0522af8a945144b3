"""From one storage dtype to another: rounding to nearest, or stochastically with noise that is keyed."""

from __future__ import annotations

import torch

from lisa_dist.runtime import distributed
from lisa_dist.runtime.seeds import keyed_seed

ROUNDING_CHUNK = 1 << 22  # elements rounded at a time: bounds the temporaries of stochastic rounding


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    return getattr(torch, name)


def rounding_seed(seed: int, period: int, name: str, shard_index: int) -> int:
    """Return the seed of a shard's rounding noise: the same on every replica and after a resume."""
    return keyed_seed(seed, period, name, shard_index)


def round_stochastically(values: torch.Tensor, seed: int) -> torch.Tensor:
    """Round fp32 ``values`` to bf16 so that the expectation of the result is the value.

    bf16 is the upper half of fp32, so 16 uniform random bits are added to the lower half, which is then cut
    off: the chance to go up is the share of the way to the next bf16 number. Values that are not finite are
    rounded to nearest.
    """
    generator = torch.Generator(device=values.device).manual_seed(seed)
    source = values.contiguous().view(-1)
    rounded = torch.empty_like(source, dtype=torch.bfloat16)
    starts = range(0, source.numel(), ROUNDING_CHUNK)
    for start in starts[:1] if distributed.is_simulated() else starts:  # each needs the memory of the first
        chunk = source[start : start + ROUNDING_CHUNK]
        # One draw of 64 bits serves four elements: drawing is the slowest part of a switch.
        bits = torch.empty((chunk.numel() + 3) // 4, dtype=torch.int64, device=values.device)
        bits.random_(-(2**63), None, generator=generator)
        noise = bits.view(torch.int16)[: chunk.numel()].to(torch.int32).bitwise_and_(0xFFFF)
        moved = (chunk.view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32)
        rounded[start : start + ROUNDING_CHUNK] = torch.where(chunk.isfinite(), moved, chunk).to(torch.bfloat16)
    return rounded.view(values.shape)


def convert(values: torch.Tensor, dtype: torch.dtype, seed: int | None) -> torch.Tensor:
    """Return ``values`` in ``dtype``; from fp32 to bf16 with stochastic rounding where ``seed`` is given."""
    if seed is not None and values.dtype == torch.float32 and dtype == torch.bfloat16:
        return round_stochastically(values, seed)
    return values.to(dtype)
