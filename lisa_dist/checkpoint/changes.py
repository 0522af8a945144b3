"""What changed since the last checkpoint: which weights the next one writes, and which earlier ones it depends on.

Names in, names out: nothing here knows tensors, ranks or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointPlan:
    """Where each weight of one checkpoint is: in its own files, or in those of an earlier one."""

    name: str
    base_checkpoint_of: dict[str, str]  # weight -> name of the checkpoint whose files hold it
    since_full: int  # checkpoints since the last full one, 0 for a full one

    @property
    def written(self) -> set[str]:
        """The weights that its own files hold."""
        return {weight for weight, base in self.base_checkpoint_of.items() if base == self.name}

    @property
    def external(self) -> dict[str, list[str]]:
        """The weights that earlier checkpoints hold, by the name of that checkpoint."""
        found: dict[str, list[str]] = {}
        for weight, base in self.base_checkpoint_of.items():
            if base != self.name:
                found.setdefault(base, []).append(weight)
        return found

    @property
    def depends_on(self) -> list[str]:
        """The names of the earlier checkpoints without which this one can't be read."""
        return sorted(self.external)


def plan_of_checkpoint(
    name: str, weights: Iterable[str], external: Mapping[str, Iterable[str]], since_full: int
) -> CheckpointPlan:
    """Return the plan by which a checkpoint of all ``weights`` was written, from what its state says of it."""
    base_of = {weight: base for base, names in external.items() for weight in names}
    return CheckpointPlan(name, {weight: base_of.get(weight, name) for weight in weights}, since_full)


class ChangedWeights:
    """Remembers what the newest complete checkpoint holds, and which weights changed after it.

    A checkpoint that was begun may fail, or be written while training goes on. So what changed is counted twice:
    since the newest complete checkpoint, and since the one that was begun last; the second count takes the place of
    the first when that one is complete.
    """

    def __init__(self, full_every: int) -> None:
        """Begin without a checkpoint, so that the next one is full, and every ``full_every``-th from there on."""
        self.full_every = full_every
        self.newest: CheckpointPlan | None = None  # complete
        self.changed: set[str] = set()  # since the newest complete checkpoint was begun
        self.changed_since_begun: set[str] = set()  # since the last one was begun, complete or not

    def note_trained(self, names: Iterable[str]) -> None:
        """Remember that these weights change from now on; to be called after every switch."""
        names = set(names)
        self.changed |= names
        self.changed_since_begun |= names

    def begin(self, name: str, weights: Iterable[str], trained: Iterable[str]) -> CheckpointPlan:
        """Return what a checkpoint that is written now holds, of all weights.

        Those that are trained now go on to change while it is written.
        """
        trained, newest = set(trained), self.newest
        self.changed_since_begun = set(trained)
        if newest is None or newest.since_full + 1 >= self.full_every:
            return CheckpointPlan(name, dict.fromkeys(weights, name), since_full=0)
        base_checkpoint_of = {}
        for weight in weights:
            base = newest.base_checkpoint_of.get(weight, name)  # what no checkpoint holds yet is written
            base_checkpoint_of[weight] = name if weight in self.changed | trained else base
        # A base of this very name is the checkpoint that this one replaces: what that one holds is written again.
        return CheckpointPlan(name, base_checkpoint_of, newest.since_full + 1)

    def complete(self, plan: CheckpointPlan) -> None:
        """Take note that the checkpoint that was begun last is complete."""
        self.newest = plan
        self.changed = set(self.changed_since_begun)

    def continue_from(self, plan: CheckpointPlan, trained: Iterable[str]) -> None:
        """Build on the checkpoint that a run is resumed from, with these weights being trained."""
        self.changed_since_begun = set(trained)
        self.complete(plan)
