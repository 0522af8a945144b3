"""Parallel dimensions: how the ranks divide the work, which micro-batches are whose, and who adds up the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lisa_dist.config import ParallelConfig
from lisa_dist.config.checks import check_grid
from lisa_dist.runtime import distributed


@dataclass(frozen=True)
class ParallelDims:
    """The ranks as a grid: ``replicate`` copies of the model, each sharded over ``shard`` neighbouring ranks.

    Every rank has micro-batches of its own. Ranks that split one sequence among them would be a third axis,
    ``context``: a field here and in ``axes``, and a divisor in ``data_rank``; the loss is theirs together too.
    """

    num_ranks: int  # all there are
    replicate: int
    shard: int

    def __post_init__(self) -> None:
        """Raise :class:`UserError` where the axes do not make up the ranks."""
        check_grid(self.num_ranks, self.replicate, self.shard)

    @classmethod
    def of(cls, config: ParallelConfig, num_ranks: int | None = None) -> ParallelDims:
        """Return the dimensions that ``parallel.*`` describes. No communication.

        Args:
            config: ``shard=auto`` takes what ``replicate`` leaves.
            num_ranks: of a cluster that is not here; None: those of the process group.

        Raises:
            UserError: so many ranks can't be split like this.
        """
        ranks = distributed.world_size() if num_ranks is None else num_ranks
        return cls(ranks, config.replicate, config.ranks_of_replica(ranks))

    @property
    def axes(self) -> dict[str, int]:
        """The axes of the mesh and their sizes; ``replicate`` only where there are several replicas."""
        return {"replicate": self.replicate, "shard": self.shard} if self.replicate > 1 else {"shard": self.shard}

    @property
    def data_ranks(self) -> int:
        """How many ranks take different micro-batches of a global batch."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """This rank's place among them: which micro-batches are its own."""
        return distributed.rank()

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The device mesh. Collective where it is read first: every rank."""
        return init_device_mesh(distributed.device().type, tuple(self.axes.values()), mesh_dim_names=tuple(self.axes))

    @cached_property
    def loss_group(self) -> dist.ProcessGroup:
        """The process group of all ranks of the mesh, over which losses and label tokens are added up.

        Collective where it is read first, every rank; torch takes the group that is there already where it has the
        same ranks, so on a GPU it has its half for tensors on the CPU too.
        """
        in_one_line = self.mesh if self.mesh.ndim == 1 else DeviceMesh(self.mesh.device_type, self.mesh.mesh.flatten())
        return in_one_line.get_group()

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum over ``loss_group``, in float64. Collective: every rank."""
        return values if distributed.is_alone() else distributed.all_reduce_sum(values, self.loss_group)

    def sum_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the same of a tensor, where that is: no host waits for its device. Collective: every rank."""
        total = tensor.double()
        if not distributed.is_alone():
            dist.all_reduce(total, group=self.loss_group)
        return total

    def __str__(self) -> str:
        """As ``2 replicate x 4 shard``."""
        return " x ".join(f"{size} {axis}" for axis, size in self.axes.items())
