"""Lion (Chen et al., arXiv 2302.06675, Algorithm 2): one moment, and steps that are signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_dist.config.optimization import LionConfig
from lisa_dist.method.optim.spec import Moment, OptimizerSpec
from lisa_dist.runtime.distributed import local_shard

MOMENT = Moment("exp_avg")


def lion(config: LionConfig) -> OptimizerSpec:
    """Return the specification of Lion: half of AdamW's moments."""

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Lion(groups, config.lr, config.betas[0], config.betas[1])

    return OptimizerSpec((MOMENT,), build, zero_state, lambda shard: shard.nbytes)


def zero_state(optimizer: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has made no step; steps are not counted, nothing is corrected by them."""
    return {MOMENT.name: torch.zeros_like(stepped.detach())}


class Lion(torch.optim.Optimizer):
    """With m the moment and g the gradient: w <- w - lr (sign(beta1 m + (1 - beta1) g) + decay w), then
    m <- beta2 m + (1 - beta2) g.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, beta1: float, beta2: float) -> None:
        super().__init__(groups, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures have no use here
        """Step what has a gradient, shard by shard: all is by element, so a shard needs no other."""
        for group in self.param_groups:
            lr, beta1, beta2 = group["lr"], group["beta1"], group["beta2"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                weight, gradient = local_shard(parameter.detach()), local_shard(parameter.grad)
                moment = local_shard(self.state[parameter][MOMENT.name])
                direction = moment.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
                weight.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                moment.mul_(beta2).add_(gradient, alpha=1 - beta2)
