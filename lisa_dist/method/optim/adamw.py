"""AdamW (arXiv 1711.05101), torch's: two moments in the dtype of the masters."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lisa_dist.config.optimization import AdamWConfig
from lisa_dist.method.optim.spec import Moment, OptimizerSpec
from lisa_dist.models.kernels import has_triton
from lisa_dist.runtime.distributed import local_shard

MOMENTS = (Moment("exp_avg"), Moment("exp_avg_sq", squared=True))


def adamw(config: AdamWConfig) -> OptimizerSpec:
    """Return the specification of AdamW."""

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return FusedAdamW(
            groups,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            fused=True,  # no temporaries; foreach would hold several times the parameters
        )

    return OptimizerSpec(MOMENTS, build, zero_state, lambda shard: len(MOMENTS) * shard.nbytes, scales_gradients=True)


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW; on a GPU by a kernel that moves 28 bytes a parameter where torch's moves 32.

    The kernel also writes the ``compute_copy`` of a master that has one, which takes 2 bytes more.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    copied: Collection[Tensor] = ()  # the masters whose copies the last step wrote

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make a step of the parameters that have a gradient."""
        stepped = [(group, one) for group in self.param_groups for one in group["params"] if one.grad is not None]
        self.copied = ()
        if closure is not None or not stepped or not all(_has_kernel(parameter) for _, parameter in stepped):
            return super().step(closure)
        from lisa_dist.method.optim.adamw_kernel import adamw_step  # Triton is there where there is a GPU

        like = local_shard(stepped[0][1])
        divisor = like.new_ones(()) if self.grad_scale is None else self.grad_scale
        left_out = like.new_zeros(()) if self.found_inf is None else self.found_inf
        for group, parameter in stepped:
            state = self.state[parameter]
            state["step"] += 1 - left_out
            moments = local_shard(state["exp_avg"]), local_shard(state["exp_avg_sq"])
            numbers = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            gradient, copy = local_shard(parameter.grad).contiguous(), getattr(parameter, "compute_copy", None)
            adamw_step(local_shard(parameter), copy, gradient, moments, state["step"], divisor, left_out, *numbers)
        self.copied = [parameter for _, parameter in stepped if hasattr(parameter, "compute_copy")]
        return None


def _has_kernel(parameter: Tensor) -> bool:
    """Whether Triton can step a parameter: on a GPU, with which it comes, in float32."""
    shard = local_shard(parameter)
    return shard.is_cuda and shard.dtype == torch.float32 and shard.is_contiguous() and has_triton()


def zero_state(optimizer: torch.optim.Optimizer, stepped: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter that has made no step."""
    return {"step": zero_steps(stepped)} | {moment.name: torch.zeros_like(stepped.detach()) for moment in MOMENTS}


def zero_steps(stepped: Tensor) -> Tensor:
    """Return the count of steps as optimizers of torch keep it, on the device of what is stepped."""
    return torch.zeros((), dtype=torch.float32, device=local_shard(stepped).device)
