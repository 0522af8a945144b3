"""AdamW (arXiv 1711.05101), torch's: two moments in the dtype of the masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_dist.config.optimization import AdamWConfig
from lisa_dist.method.optim.spec import Moment, OptimizerSpec
from lisa_dist.runtime.distributed import local_shard

MOMENTS = (Moment("exp_avg"), Moment("exp_avg_sq", squared=True))


def adamw(config: AdamWConfig) -> OptimizerSpec:
    """Return the specification of AdamW."""

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            fused=True,  # no temporaries; foreach would hold several times the parameters
        )

    return OptimizerSpec(MOMENTS, build, zero_state, lambda shard: len(MOMENTS) * shard.nbytes, scales_gradients=True)


def zero_state(optimizer: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has made no step."""
    return {"step": zero_steps(stepped)} | {moment.name: torch.zeros_like(stepped.detach()) for moment in MOMENTS}


def zero_steps(stepped: Tensor) -> Tensor:
    """Return the count of steps as optimizers of torch keep it, on the device of what is stepped."""
    return torch.zeros((), dtype=torch.float32, device=local_shard(stepped).device)
