"""Masters, moments and gradients of what trains, sharded over all ranks of a replicate x shard mesh.

FSDP2 shards a parameter over ``shard``; the same rows lie on every replica. Here the rows of a shard are split once
more, among the replicas, for all that the optimizer needs. The shard itself is what the model computes with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.fsdp2 import free_allreduce_buffer

HELD = (Shard(0), Replicate())  # a shard's rows, on every replica
OWN = (Shard(0), Shard(0))  # of these, the rows of one replica


class WorldMasters:
    """The masters of what trains: of each shard this rank has the rows that are its own among the replicas."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """Args:
        mesh: ``replicate`` x ``shard``, whose process groups are used again.
        """
        # The replicas come last, since a shard's rows are split among them.
        self.mesh = DeviceMesh.from_group(
            [mesh.get_group("shard"), mesh.get_group("replicate")],
            mesh.device_type,
            mesh=mesh.mesh.T,
            mesh_dim_names=("shard", "replicate"),
        )
        self.by_name: dict[str, nn.Parameter] = {}
        self.receives_gradients = True  # False while a probe looks at them
        self._received_from: Any = None  # the FSDP2 group whose gradients came last

    def own_rows(self, shard: Tensor, parameter: Tensor) -> Tensor:
        """Return a copy of this rank's own rows of a shard, a DTensor. No communication.

        Args:
            shard: this rank's rows by FSDP2, of any dtype.
            parameter: whose rows they are, for the shape of the whole.
        """
        held = DTensor.from_local(
            shard.detach(), self.mesh, HELD, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        return held.redistribute(placements=OWN).clone()

    def take(self, name: str, shard: Tensor, parameter: Tensor) -> None:
        """Make the master of a parameter from its shard, which is in the masters' dtype. No communication."""
        self.by_name[name] = nn.Parameter(self.own_rows(shard, parameter))

    def gather(self, name: str) -> Tensor:
        """Drop a master and return the whole shard, in the masters' dtype. Collective: every rank."""
        return self._gathered(self.by_name.pop(name).detach())

    def all_gather_to_params(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Round the masters of ``parameters`` to nearest and put them into the shards. Collective: every rank."""
        for name, parameter in parameters.items():
            shard = local_shard(parameter.detach())
            shard.copy_(self._gathered(self.by_name[name].detach().to(shard.dtype)))

    def _gathered(self, own: Tensor) -> Tensor:
        assert isinstance(own, DTensor)
        return local_shard(own.redistribute(placements=HELD))

    def register_grad_hook(self, name: str, parameter: nn.Parameter, group: Any) -> None:
        """Have a parameter's gradient, as soon as its FSDP2 group has reduced it, added to its master's and dropped.

        It comes in the masters' dtype, so that nothing is rounded while gradients of micro-batches add up.
        """

        def receive(parameter: Tensor) -> None:
            if not self.receives_gradients or parameter.grad is None:
                return
            if self._received_from is not group:
                if self._received_from is not None:
                    free_allreduce_buffer(self._received_from)
                self._received_from = group
            own, master = self.own_rows(local_shard(parameter.grad), parameter), self.by_name[name]
            if master.grad is None:
                master.grad = own
            else:
                local_shard(master.grad).add_(local_shard(own))
            parameter.grad = None

        parameter.grad_dtype = self.by_name[name].dtype
        parameter.register_post_accumulate_grad_hook(receive)
