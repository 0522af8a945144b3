"""The wrapping policy: which module becomes which FSDP2 group, on which mesh, and in which dtype it is stored.

Every block is a group of its own; the always-active modules are groups of their own too, in one group
where their weights are tied. Frozen parameters are stored in ``precision.frozen``, trained ones in
``precision.active``, and both are gathered in ``precision.compute``. Adapters stay in ``precision.active`` while they
are frozen: they are small, and rounding would take more from them at each freeze than a period adds.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lisa_dist.config import ParallelConfig, PrecisionConfig
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.sharding.rounding import dtype_of


def storage_dtype(precision: PrecisionConfig, as_trained: bool) -> torch.dtype:
    """Return the dtype in which a parameter of floating-point numbers is stored that trains, or is kept as if."""
    return dtype_of(precision.active if as_trained else precision.frozen)


def wrap(
    model: nn.Module, layers: LayerMap, mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> None:
    """Apply FSDP2 to a model on ``meta``, group by group. Nothing is allocated.

    Gradients are summed over the ranks, never divided: the trainer divides by the number of label tokens of
    the global batch. The sum is made with plain SUM reductions, which gloo needs.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(precision.compute), reduce_dtype=dtype_of(precision.reduce), cast_forward_inputs=False
    )
    pin = mesh.device_type == "cuda"
    offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=pin) if parallel.offload == "all" else OffloadPolicy()

    def group(modules: nn.Module | list[nn.Module]) -> None:
        fully_shard(
            modules,  # type: ignore[arg-type]
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=parallel.reshard_after_forward,
        )

    for block in layers.blocks:
        group(block)
    non_block_modules = [layers.embeddings, layers.norm, [layers.head]]
    if layers.tied:  # FSDP2 wants a shared parameter in one group only
        non_block_modules = [[module for modules in non_block_modules for module in modules]]
    for modules in non_block_modules:
        if modules:
            group(modules)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # a lone rank divides by nothing anyway, but would copy every gradient to do so
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
