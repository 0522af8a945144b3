"""The wrapping policy: which module becomes which FSDP2 group, on which mesh, and in which dtype it is stored.

Every block is a group of its own; the always-active modules are groups of their own too, in one group
where their weights are tied. Frozen parameters are stored in ``precision.frozen``, trained ones in
``precision.active`` (the shard is the master weight: no other copy stays), and both are gathered in
``precision.compute``. Adapters stay in ``precision.active`` while they are frozen: they are small, and rounding would
take more from them at each freeze than a period adds. With ``parallel.optimizer_shard=world`` the masters lie apart,
sharded over all ranks, and the shard of a trained parameter is stored in ``precision.compute`` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lisa_dist.config import AlwaysActiveConfig, ParallelConfig, PrecisionConfig
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding import fsdp2
from lisa_dist.sharding.masters import WorldMasters


@dataclass
class ShardedStore:
    """A model whose parameters are sharded over a mesh, with the handles that a switch needs."""

    module: nn.Module
    layers: LayerMap
    mesh: DeviceMesh
    precision: PrecisionConfig
    handles: dict[str, tuple[Any, Any]]  # parameter name -> (FSDPParam, its group)
    offloads_frozen: bool = False  # frozen parameters live in host memory
    world: WorldMasters | None = None  # the masters, where they are not the shards of what trains
    keeps_precision: Callable[[str], bool] = lambda name: False  # whether a frozen parameter is stored as what trains

    @property
    def names(self) -> KeysView[str]:
        """The names of all parameters, tied ones once."""
        return self.handles.keys()

    @property
    def shard_index(self) -> int:
        """This rank's place on the mesh axis over which parameters are sharded."""
        return self.mesh.get_local_rank("shard")

    def parameters_of(self, part: str) -> list[str]:
        """Return the parameter names of a part: ``block:<i>``, ``embeddings``, ``norm`` or ``head``."""
        return [name for name in self.handles if self.layers.group_of(name) == part]

    def block_parameters(self, block: int) -> list[str]:
        """Return the names of all parameters of a block."""
        return self.parameters_of(f"block:{block}")

    def parameter(self, name: str) -> nn.Parameter:
        """Return the sharded parameter of that name."""
        return self.handles[name][0].sharded_param

    def master(self, name: str) -> nn.Parameter:
        """Return what holds the exact value of a parameter: its master, or the sharded parameter itself."""
        masters = {} if self.world is None else self.world.by_name
        return masters.get(name, self.parameter(name))

    def storage_dtype(self, name: str, trained: bool) -> torch.dtype:
        """Return the dtype that a parameter of floating-point numbers is stored in while it trains, or does not."""
        as_trained = trained or self.keeps_precision(name)
        return dtype_of(self.precision.active if as_trained else self.precision.frozen)


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of that name."""
    return getattr(torch, name)


def shard_model(
    model: nn.Module,
    layers: LayerMap,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    keeps_precision: Callable[[str], bool] = lambda name: False,
) -> ShardedStore:
    """Apply FSDP2 to a model on ``meta``, group by group. Nothing is allocated.

    Gradients are summed over the ranks, never divided: the trainer divides by the number of label tokens of
    the global batch. The sum is made with plain SUM reductions, which gloo needs.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=dtype_of(precision.compute), reduce_dtype=dtype_of(precision.reduce), cast_forward_inputs=False
    )
    pin = mesh.device_type == "cuda"
    offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=pin) if parallel.offload == "all" else OffloadPolicy()

    def wrap(modules: nn.Module | list[nn.Module]) -> None:
        fully_shard(
            modules,  # type: ignore[arg-type]
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload,
            reshard_after_forward=parallel.reshard_after_forward,
        )

    for block in layers.blocks:
        wrap(block)
    non_block_modules = [layers.embeddings, layers.norm, [layers.head]]
    if layers.tied:  # FSDP2 wants a shared parameter in one group only
        non_block_modules = [[module for modules in non_block_modules for module in modules]]
    for modules in non_block_modules:
        if modules:
            wrap(modules)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:  # a lone rank divides by nothing anyway, but would copy every gradient to do so
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    handles = fsdp2.fsdp_parameters(model)
    world = WorldMasters(mesh) if parallel.optimizer_shard == "world" and parallel.replicate > 1 else None
    offloads = parallel.offload == "frozen"
    return ShardedStore(model, layers, mesh, precision, handles, offloads, world, keeps_precision)


def always_active_parameters(store: ShardedStore, always_active: AlwaysActiveConfig) -> list[str]:
    """Return the names of the parameters outside the blocks that train in every period.

    Raises:
        UserError: tied weights would be both trained and frozen.
    """
    always_active.check_tied(store.layers.tied)
    trained = {"embeddings": always_active.embeddings, "norm": always_active.norm, "head": always_active.head}
    return [name for role, active in trained.items() if active for name in store.parameters_of(role)]


def materialize(store: ShardedStore, trained: Iterable[str], device: torch.device) -> None:
    """Allocate every shard, uninitialised, in the dtype of its state, and every buffer.

    Args:
        store: a model on ``meta``.
        trained: names of the parameters that train from the start; all others are frozen.
        device: where the shards live.
    """
    active = set(trained)
    for name, (fsdp_param, _) in store.handles.items():
        dtype = store.storage_dtype(name, trained=name in active)
        if not fsdp_param.sharded_param.is_floating_point():
            dtype = fsdp_param.sharded_param.dtype  # codes of a quantised weight
        on_host = store.offloads_frozen and name not in active
        shard = torch.empty(fsdp_param.sharded_size, dtype=dtype, device="cpu" if on_host else device)
        _store(store, name, shard, trained=name in active)
    for module in store.module.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)
    if store.world is not None:
        store.world.by_name.clear()
        fsdp2.finish_initialization(store.module)
    _refresh_groups(store, store.names)


def set_trainable(
    store: ShardedStore, names: Iterable[str], trained: bool, seed_of: Callable[[str], int] | None = None
) -> None:
    """Freeze or thaw parameters: set their storage dtype and whether they train.

    Collective, every rank, where masters are given back: with ``parallel.optimizer_shard=world``.

    Args:
        store: the model; none of its groups may be unsharded.
        names: the parameters that begin or cease to train; buffers and all other parameters are left alone.
        trained: True stores them in ``precision.active``, False in ``precision.frozen``, but for adapters.
        seed_of: the seed of a parameter's rounding noise; None rounds to nearest.
    """
    names = list(names)
    for name in names:
        dtype = store.storage_dtype(name, trained)
        fsdp_param, group = store.handles[name]
        shard = local_shard(fsdp_param.sharded_param.detach())
        if store.world is not None and name in store.world.by_name:
            shard = store.world.gather(name)
        seed = seed_of(name) if seed_of is not None else None
        if store.offloads_frozen and trained:
            shard = shard.to(distributed.device(), non_blocking=True)
        shard = fsdp2.convert(shard, dtype, seed)
        if store.world is not None and trained:
            store.world.take(name, shard, fsdp_param.sharded_param)
            shard = shard.to(dtype_of(store.precision.compute))
        _store(store, name, shard, trained)
        if store.world is not None and trained:
            store.world.register_grad_hook(name, fsdp_param.sharded_param, group)
    _refresh_groups(store, names)


def _store(store: ShardedStore, name: str, shard: torch.Tensor, trained: bool) -> None:
    """Put a parameter's shard in its place; a frozen one in host memory where frozen parameters live there."""
    fsdp_param, _ = store.handles[name]
    if store.offloads_frozen:
        fsdp2.place_on_host(fsdp_param, not trained, pin_memory=store.mesh.device_type == "cuda")
        shard = shard if trained else shard.cpu()
    fsdp2.replace_shard(fsdp_param, shard, requires_grad=trained)


@contextmanager
def also_trained(store: ShardedStore, names: Iterable[str]) -> Iterator[None]:
    """Let parameters that are frozen have gradients too while the context lasts, in the dtype they are stored in.

    Of one FSDP2 group all trainable parameters must then have one dtype, so name those of whole blocks.
    """
    names = [name for name in names if not store.parameter(name).requires_grad]
    fsdp2.reshard_all(store.module)
    for name in names:
        store.parameter(name).requires_grad_(True)
    _refresh_groups(store, names)
    if store.world is not None:
        store.world.receives_gradients = False
    try:
        yield
    finally:
        if store.world is not None:
            store.world.receives_gradients = True
        fsdp2.reshard_all(store.module)
        for name in names:
            store.parameter(name).requires_grad_(False).grad = None
        _refresh_groups(store, names)


def _refresh_groups(store: ShardedStore, names: Iterable[str]) -> None:
    with_masters = set() if store.world is None else {id(store.handles[name][1]) for name in store.world.by_name}
    groups = {id(store.handles[name][1]): store.handles[name][1] for name in names}
    for key, group in groups.items():
        fsdp2.refresh_group(group, dtype_of(store.precision.active) if key in with_masters else None)


def persistent_bytes(store: ShardedStore) -> dict[str, int]:
    """Count this rank's bytes of parameters and gradients, by kind, as they lie in memory (padding left out).

    ``masters`` are named only where they lie apart from the parameters.
    """
    counted = {"frozen_parameters": 0, "active_parameters": 0, "gradients": 0}
    if store.world is not None:
        counted["masters"] = 0
    for name in store.names:
        parameter, master = store.parameter(name), store.master(name)
        shard = local_shard(parameter.detach())
        counted["active_parameters" if parameter.requires_grad else "frozen_parameters"] += shard.nbytes
        if master is not parameter:
            counted["masters"] += local_shard(master.detach()).nbytes
        if master.grad is not None:
            counted["gradients"] += local_shard(master.grad).nbytes
    return counted
