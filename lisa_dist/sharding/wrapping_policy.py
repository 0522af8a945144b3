"""The wrapping policy: which module becomes which FSDP2 group, on which mesh, and in which dtype it is stored.

Every block is a group of its own; the always-active modules are groups of their own too, in one group
where their weights are tied. Frozen parameters are stored in ``precision.frozen``, trained ones in
``precision.active``, and both are gathered in ``precision.compute``. Adapters stay in ``precision.active`` while they
are frozen: they are small, and rounding would take more from them at each freeze than a period adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lisa_dist.config import ParallelConfig, PrecisionConfig
from lisa_dist.models.layer_map import EMBEDDINGS, HEAD, LayerMap
from lisa_dist.sharding.rounding import dtype_of


def storage_dtype(precision: PrecisionConfig, as_trained: bool) -> torch.dtype:
    """Return the dtype in which a parameter of floating-point numbers is stored that trains, or is kept as if."""
    return dtype_of(precision.active if as_trained else precision.frozen)


def wrap(
    model: nn.Module, layers: LayerMap, mesh: DeviceMesh, parallel: ParallelConfig, precision: PrecisionConfig
) -> dict[str, list[FSDPModule]]:
    """Apply FSDP2 to a model on ``meta``, group by group. Nothing is allocated.

    Gradients are summed over the ranks, never divided: the trainer divides by the number of label tokens of
    the global batch. The sum is made with plain SUM reductions, which gloo needs.

    What the backward pass begins with (the last block, norm and head, and what is tied to it) stays gathered after the
    forward pass. Embeddings are not gathered in the backward pass: the gradient of rows that are looked up needs none.

    Returns:
        A module of each group, by part in the order of the forward pass: embeddings, each block, head with norm.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(precision.compute), reduce_dtype=dtype_of(precision.reduce), cast_forward_inputs=False
    )
    pin = mesh.device_type == "cuda"
    offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=pin) if parallel.offload == "all" else OffloadPolicy()

    def group(modules: list[nn.Module], reshards: bool) -> list[FSDPModule]:
        if not modules:
            return []
        wrapped: Any = fully_shard(
            modules, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshards
        )
        # Of modules one in another, as where a model has parameters beside its embeddings, the outer one is wrapped.
        return [next(module for module in wrapped if isinstance(module, FSDPModule))]

    reshards = parallel.reshard_after_forward
    blocks = [group([block], reshards and block is not layers.blocks[-1]) for block in layers.blocks]
    if layers.tied:  # FSDP2 wants a shared parameter in one group only
        first, last = group([*layers.embeddings, *layers.norm, layers.head], reshards=False), []
    else:
        first = group(layers.embeddings, reshards)
        last = group(layers.norm, reshards=False) + group([layers.head], reshards=False)
        for embeddings in first:
            embeddings.set_unshard_in_backward(not all(map(_only_looks_up, layers.embeddings)))
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # a lone rank divides by nothing anyway, but would copy every gradient to do so
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    stages = {EMBEDDINGS: first} | {f"block:{index}": block for index, block in enumerate(blocks)} | {HEAD: last}
    return {part: modules for part, modules in stages.items() if modules}


def _only_looks_up(module: nn.Module) -> bool:
    """Whether a module of embeddings has no parameter but its table: another one may be needed in the backward pass."""
    return [name for name, _ in module.named_parameters()] == ["weight"]
