"""Any update, where masters are sharded over all ranks and not only within a replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lisa_dist.method.updates.base import OptimizedParam, Update
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.masters import WorldMasters


class StepsMasters(Update):
    """For the optimizer of a model with :class:`WorldMasters`: wraps the update, so that it acts on the masters.

    What the wrapped update sees of a parameter is its master: the gradients lie there, sharded over all ranks, and
    the optimizer's steps are made there. Afterwards the steps are gathered into the parameters.
    """

    def __init__(self, update: Update, masters: WorldMasters) -> None:
        self.update = update
        self.masters = masters

    def optimized_param(self, name: str, parameter: nn.Parameter) -> OptimizedParam:
        """Return what the update steps for the master; of a frozen parameter, for a copy of the rows that would be it.

        Raises:
            ValueError: the update steps something else than the parameter, which has no master.
        """
        master = self.masters.by_name.get(name)
        if master is None:
            master = nn.Parameter(self.masters.own_rows(local_shard(parameter), parameter))
        entry = self.update.optimized_param(name, master)
        if entry.stepped is not master:
            raise ValueError(f"{name}: {type(self.update).__name__} steps a stand-in, which has no master to shard")
        return replace(entry, parameter=parameter)

    def transform_gradients(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Let the update transform the masters' gradients. Collective where the update's is: every rank."""
        self.update.transform_gradients(_of_masters(trained))

    def apply_steps(self, trained: Mapping[str, OptimizedParam], decay: float) -> None:
        """Let the update finish the masters' steps, and gather what was stepped. Collective: every rank."""
        self.update.apply_steps(_of_masters(trained), decay)
        self.masters.all_gather_to_params({name: entry.parameter for name, entry in trained.items()})


def _of_masters(trained: Mapping[str, OptimizedParam]) -> dict[str, OptimizedParam]:
    """Return the entries as they would be if the masters were the parameters."""
    return {name: replace(entry, parameter=entry.stepped) for name, entry in trained.items()}
