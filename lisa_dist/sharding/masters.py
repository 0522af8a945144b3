"""The sharded store whose masters, moments and gradients lie over all ranks of a replicate x shard mesh.

FSDP2 shards a parameter over ``shard``; the same rows lie on every replica. Here the rows of a shard are split once
more, among the replicas, for all that the optimizer needs. The shard itself, in ``precision.compute``, is what the
model computes with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding import fsdp2
from lisa_dist.sharding.rounding import dtype_of
from lisa_dist.sharding.sharded import ShardedStore
from lisa_dist.sharding.store import GradHook

HELD = (Shard(0), Replicate())  # a shard's rows, on every replica
OWN = (Shard(0), Shard(0))  # of these, the rows of one replica


class WorldMastersStore(ShardedStore):
    """Of the shard of what trains this rank has the masters of the rows that are its own among the replicas."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Wrap a model on ``meta``, as :class:`ShardedStore` does, over ``replicate`` x ``shard``."""
        super().__init__(*args, **kwargs)
        mesh = self.mesh
        # The replicas come last, since a shard's rows are split among them.
        self._own_mesh = DeviceMesh.from_group(
            [mesh.get_group("shard"), mesh.get_group("replicate")],
            mesh.device_type,
            mesh=mesh.mesh.T,
            mesh_dim_names=("shard", "replicate"),
        )
        self._masters: dict[str, nn.Parameter] = {}
        self._receives_gradients = True  # False while a probe looks at them
        self._received_from: Any = None  # the FSDP2 group whose gradients came last

    def master(self, name: str) -> nn.Parameter:
        """Return this rank's own rows where there are some; of a frozen parameter, the shard."""
        return self._masters.get(name, self.parameter(name))

    def like_master(self, name: str) -> nn.Parameter:
        """Return a copy of the rows that would be a frozen parameter's master."""
        return nn.Parameter(self._own_rows(local_shard(self.parameter(name)), self.parameter(name)))

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        """Allocate every shard, for now in the dtype of masters where it trains."""
        self._masters.clear()
        super().allocate(trained, device)
        # Else the first forward would read again which dtype reduced gradients have.
        fsdp2.finish_initialization(self.module)

    def make_masters(self, trained: Iterable[str]) -> None:
        """Make masters of the shards, which then change to the dtype that the model computes in. No communication."""
        self.set_trainable(trained, trained=True)

    def masters_to_params(self, names: Iterable[str]) -> None:
        """Gather the masters of each shard, rounded to nearest. Collective: every rank."""
        for name in names:
            shard = local_shard(self.parameter(name).detach())
            shard.copy_(self._gathered(self._masters[name].detach().to(shard.dtype)))

    @contextmanager
    def also_trained(self, names: Iterable[str], hook: GradHook) -> Iterator[None]:
        """Let frozen parameters have gradients too, and no master receive any, while the context lasts."""
        self._receives_gradients = False
        try:
            with super().also_trained(names, hook):
                yield
        finally:
            self._receives_gradients = True

    def _take_exact(self, name: str) -> Tensor:
        """Return the shard; where there is a master, drop it for the shard it gives. Collective then: every rank."""
        if name not in self._masters:
            return super()._take_exact(name)
        return self._gathered(self._masters.pop(name).detach())

    def _put_exact(self, name: str, shard: Tensor, trained: bool) -> None:
        if not trained:
            self._put(name, shard, trained)
            return
        self._masters[name] = nn.Parameter(self._own_rows(shard, self.parameter(name)))
        self._put(name, shard.to(dtype_of(self.precision.compute)), trained)
        self._register_grad_hook(name)

    def _gradient_dtype(self, group: Any) -> torch.dtype | None:
        with_master = any(self.handles[name][1] is group for name in self._masters)
        return dtype_of(self.precision.active) if with_master else None

    def _own_rows(self, shard: Tensor, parameter: Tensor) -> Tensor:
        """Return a copy of this rank's own rows of a shard, a DTensor. No communication.

        Args:
            shard: this rank's rows by FSDP2, of any dtype.
            parameter: whose rows they are, for the shape of the whole.
        """
        held = DTensor.from_local(
            shard.detach(), self._own_mesh, HELD, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return held.redistribute(placements=OWN).clone()

    def _gathered(self, own: Tensor) -> Tensor:
        assert isinstance(own, DTensor)
        return local_shard(own.redistribute(placements=HELD))

    def _register_grad_hook(self, name: str) -> None:
        """Have a parameter's gradient, as soon as its FSDP2 group has reduced it, added to its master's and dropped.

        It comes in the masters' dtype, so that nothing is rounded while gradients of micro-batches add up.
        """
        group = self.handles[name][1]

        def receive(parameter: Tensor) -> None:
            if not self._receives_gradients or parameter.grad is None:
                return
            if self._received_from is not group:
                if self._received_from is not None:
                    fsdp2.free_allreduce_buffer(self._received_from)
                self._received_from = group
            own, master = self._own_rows(local_shard(parameter.grad), parameter), self._masters[name]
            if master.grad is None:
                master.grad = own
            else:
                local_shard(master.grad).add_(local_shard(own))
            parameter.grad = None

        parameter = self.parameter(name)
        parameter.grad_dtype = self._masters[name].dtype
        parameter.register_post_accumulate_grad_hook(receive)
