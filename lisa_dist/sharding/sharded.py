"""The store of several ranks: FSDP2 over a mesh, every parameter sharded by rows, gathered where it is used.

The shard of a trained parameter is its master weight: no other copy stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lisa_dist.config import ParallelConfig, PrecisionConfig, UserError
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding import fsdp2
from lisa_dist.sharding.rounding import convert, dtype_of, rounding_seed
from lisa_dist.sharding.store import GradHook, ParameterStore, allocate_buffers
from lisa_dist.sharding.wrapping_policy import storage_dtype, wrap


class ShardedStore(ParameterStore):
    """A model whose parameters are FSDP2's."""

    def __init__(
        self,
        module: nn.Module,
        layers: LayerMap,
        mesh: DeviceMesh,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        keeps_precision: Callable[[str], bool],
    ) -> None:
        """Wrap a model on ``meta``. Nothing is allocated.

        Args:
            module: the model.
            layers: its layers.
            mesh: ``shard``, or ``replicate`` x ``shard``.
            parallel: what lies in host memory, and what is resharded after the forward pass.
            precision: storage and arithmetic.
            keeps_precision: whether a frozen parameter is stored as what trains.

        Raises:
            UserError: there are quantised weights, and this torch can't shard them.
        """
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            check_torch_for_integers()
        self._stages = wrap(module, layers, mesh, parallel, precision)
        self.module, self.layers, self.mesh, self.precision = module, layers, mesh, precision
        self.keeps_precision = keeps_precision
        self.handles: dict[str, tuple[Any, Any]] = fsdp2.fsdp_parameters(module)  # (FSDPParam, its group) by name
        self._prefetch = parallel.gathered_ahead
        if mesh.device_type == "cpu" and not distributed.is_simulated():
            fsdp2.gather_in_background(module)  # type: ignore[arg-type]
        self._offloads_frozen, self._offloads_all = parallel.offload == "frozen", parallel.offload == "all"
        self._defers_reduction = parallel.defer_reduction

    @property
    def names(self) -> KeysView[str]:
        """The names of all parameters."""
        return self.handles.keys()

    @property
    def shard_index(self) -> int:
        """This rank's place on the mesh axis over which parameters are sharded."""
        return self.mesh.get_local_rank("shard")

    def parameter(self, name: str) -> nn.Parameter:
        """Return the sharded parameter."""
        return self.handles[name][0].sharded_param

    def master(self, name: str) -> nn.Parameter:
        """Return the sharded parameter: it is its own master."""
        return self.parameter(name)

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        """Allocate every shard, and every buffer."""
        active = set(trained)
        fsdp2.reshard_all(self.module)
        for name in self.names:
            old, is_active = self.parameter(name), name in active
            # An integer holds the codes of a quantised weight.
            dtype = self._storage_dtype(name, is_active) if old.is_floating_point() else old.dtype
            on_host = self._offloads_all or (self._offloads_frozen and not is_active)
            place = "cpu" if on_host else device
            self._put(name, torch.empty(self.handles[name][0].sharded_size, dtype=dtype, device=place), is_active)
        allocate_buffers(self.module, device)
        self._refresh_groups(self.names)

    def make_masters(self, trained: Iterable[str]) -> None:
        """Leave everything as it is: shards are masters."""

    def masters_to_params(self, names: Iterable[str]) -> None:
        """Leave everything as it is: shards are masters."""

    def set_trainable(self, names: Iterable[str], trained: bool, seed: int = 0, period: int = 0) -> None:
        """Give each parameter a shard in the dtype and place of its new state."""
        names = list(names)
        fsdp2.reshard_all(self.module)
        stochastic = not trained and self.precision.on_freeze == "stochastic"
        for name in names:
            shard = self._take_exact(name)
            if self._offloads_frozen and trained:
                shard = shard.to(distributed.device(), non_blocking=True)
            noise = rounding_seed(seed, period, name, self.shard_index) if stochastic else None
            self._put_exact(name, convert(shard, self._storage_dtype(name, trained), noise), trained)
        self._refresh_groups(names)

    @contextmanager
    def also_trained(self, names: Iterable[str], hook: GradHook) -> Iterator[None]:
        """Let frozen parameters have gradients too while the context lasts."""
        names = list(names)
        frozen = [name for name in names if not self.parameter(name).requires_grad]
        self._set_requires_grad(frozen, True)
        hooks = [fsdp2.have_hooks_wait(self.handles[name][0]) for name in names]
        hooks += [self.parameter(name).register_post_accumulate_grad_hook(hook) for name in names]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
            self._set_requires_grad(frozen, False)

    def _set_requires_grad(self, names: list[str], requires_grad: bool) -> None:
        fsdp2.reshard_all(self.module)
        for name in names:
            self.parameter(name).requires_grad_(requires_grad).grad = None
        self._refresh_groups(names)

    def tensors(self) -> dict[str, Tensor]:
        """Return every master and persistent buffer."""
        fsdp2.reshard_all(self.module)
        return super().tensors()

    def on_host(self, name: str) -> bool:
        """Whether the shard lies in host memory."""
        return fsdp2.is_on_host(self.handles[name][0])

    def register_grad_hook(self, name: str, hook: GradHook) -> None:
        """Have ``hook`` called with the sharded parameter."""
        fsdp2.have_hooks_wait(self.handles[name][0])
        self.parameter(name).register_post_accumulate_grad_hook(hook)

    def defer_reduction(self, deferred: bool) -> None:
        """Have coming backward passes hold gradients unsharded, where the configuration asks for it."""
        if self._defers_reduction:
            self.module.set_requires_gradient_sync(not deferred)  # type: ignore[operator]

    def transient_bytes(self) -> int:
        """Return the bytes of the groups gathered at a time with their buffers, and of the largest one's gradients."""
        sizes: dict[str, int] = {}
        for name in self.names:
            part = self.layers.group_of(name)
            sizes[part] = sizes.get(part, 0) + self.parameter(name).numel()
        largest = sorted(sizes.values())[-max(2, 1 + self._prefetch) :]
        gathered = 2 * dtype_of(self.precision.compute).itemsize * sum(largest)
        return gathered + 6 * max(sizes.values())  # a gradient as computed, and its copy in fp32 to be reduced

    def _storage_dtype(self, name: str, trained: bool) -> torch.dtype:
        return storage_dtype(self.precision, trained or self.keeps_precision(name))

    def _take_exact(self, name: str) -> Tensor:
        """Return this rank's rows of a parameter's exact value."""
        return local_shard(self.parameter(name).detach())

    def _put_exact(self, name: str, shard: Tensor, trained: bool) -> None:
        """Store the rows of a parameter's exact value, which are in the dtype of its new state."""
        self._put(name, shard, trained)

    def _put(self, name: str, shard: Tensor, trained: bool) -> None:
        """Put a parameter's shard in its place; a frozen one in host memory where frozen parameters live there."""
        fsdp_param, _ = self.handles[name]
        if self._offloads_frozen:
            fsdp2.place_on_host(fsdp_param, not trained, pin_memory=self.mesh.device_type == "cuda")
            shard = shard if trained else shard.cpu()
        fsdp2.replace_shard(fsdp_param, shard, requires_grad=trained)

    def _refresh_groups(self, names: Iterable[str]) -> None:
        for group in {id(self.handles[name][1]): self.handles[name][1] for name in names}.values():
            fsdp2.refresh_group(group, self._gradient_dtype(group))
        self._set_prefetch()

    def _set_prefetch(self) -> None:
        """Say what each group gathers ahead; in the backward pass nothing that it does not reach."""
        trained = {self.layers.group_of(name) for name in self.names if self.parameter(name).requires_grad}
        lowest = next((index for index, part in enumerate(self._stages) if part in trained), len(self._stages))
        stages = list(self._stages.values())
        for index, stage in enumerate(stages):
            ahead = stages[index + 1 : index + 1 + self._prefetch]
            behind = stages[max(lowest, index - self._prefetch) : index]
            for module in stage:
                module.set_modules_to_forward_prefetch([module for modules in ahead for module in modules])
                # An empty list would leave the choice to FSDP2; what is gathered already is not gathered again.
                module.set_modules_to_backward_prefetch(
                    [module for modules in reversed(behind) for module in reversed(modules)] or [module]
                )

    def _gradient_dtype(self, group: Any) -> torch.dtype | None:
        """Return the dtype of a group's reduced gradients, None for that of its trained parameters."""
        return None


def check_torch_for_integers() -> None:
    """Raise :class:`UserError` where this torch can't shard quantised weights."""
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 13):
        raise UserError(
            f"model.quantization must be none with torch {torch.__version__}, whose FSDP2 shards no integers; install "
            "2.13 or later, or keep weights whole on each rank, with parallel.replicate=<ranks> parallel.offload=none"
        )
