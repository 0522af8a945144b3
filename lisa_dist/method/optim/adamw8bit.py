"""AdamW whose moments are held in 8 bits (Dettmers et al., arXiv 2110.02861), by the package torchao.

A shard of at least 4096 elements, divisible by 256, has codes of one byte and an fp32 scale for every 256 of
them; smaller and odd ones stay in fp32. torchao compiles its step once for each shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_dist.config import UserError
from lisa_dist.config.optimization import AdamW8bitConfig
from lisa_dist.method.optim.adamw import MOMENTS, zero_steps
from lisa_dist.method.optim.spec import OptimizerSpec

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # elements of a shard that is held in 8 bits
TABLE_BYTES = 4 * 256  # of a moment: the number that each code stands for


def adamw8bit(config: AdamW8bitConfig) -> OptimizerSpec:
    """Return the specification of AdamW with moments in 8 bits.

    Raises:
        UserError: torchao can't be imported.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer=adamw8bit: torchao can't be imported ({error}); choose optimizer=adamw") from error

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        betas = (config.betas[0], config.betas[1])
        built: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps, block_size=BLOCK)
        return built

    return OptimizerSpec(MOMENTS, build, zero_state, state_bytes)


def zero_state(optimizer: Any, stepped: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has made no step (private: ``_new_buffer``)."""
    moments = {moment.name: optimizer._new_buffer(stepped.detach(), not moment.squared) for moment in MOMENTS}
    return {"step": zero_steps(stepped)} | moments


def state_bytes(shard: Tensor) -> int:
    """Return the bytes of the two moments of a shard."""
    count = shard.numel()
    if count < SMALLEST or count % BLOCK:
        return len(MOMENTS) * shard.nbytes
    return len(MOMENTS) * (count + 4 * count // BLOCK + TABLE_BYTES)
