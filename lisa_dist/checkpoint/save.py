"""The checkpoints of a run: what one holds is collected here, and handed to the writer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.background import CheckpointWriter
from lisa_dist.checkpoint.changes import ChangedWeights, plan_of_checkpoint
from lisa_dist.checkpoint.manifest import CONFIG, MOMENTS, STATE, WEIGHTS, checkpoint_name
from lisa_dist.checkpoint.protocol import Snapshot
from lisa_dist.checkpoint.shards import own_pieces
from lisa_dist.checkpoint.state import Progress, state_of
from lisa_dist.method.module import TrainModule


class CheckpointSaver:
    """Saves the checkpoints of one run and remembers what the last one holds.

    With ``checkpoint.full_every=n`` every n-th is full; those between hold the weights that trained since the
    checkpoint before, and name the checkpoints that hold the others.
    """

    def __init__(self, train_module: TrainModule, directory: Path, config_yaml: str) -> None:
        """Save to ``directory``; each checkpoint repeats the run's configuration. Collective: every rank."""
        config = train_module.config
        self.train_module = train_module
        self.directory = directory
        self.config_yaml = config_yaml
        self.changes = ChangedWeights(config.checkpoint.full_every)
        self.writer = CheckpointWriter(directory, config.checkpoint, config.parallel.timeout)
        train_module.optimizer.before_change = self.writer.copied.wait

    def note_trained(self) -> None:
        """Remember that the weights that train now change; to be called after every switch."""
        self.changes.note_trained(self.train_module.optimizer.parameters)

    def continue_from(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Take the checkpoint that a run is resumed from as the one that the next may build on."""
        weights = self.train_module.store.tensors()
        plan = plan_of_checkpoint(checkpoint.name, weights, state["external"], state["since_full"])
        self.changes.continue_from(plan, self.train_module.optimizer.parameters)

    def save(self, progress: Progress, is_last: bool = False) -> None:
        """Write the checkpoint of ``progress.step``, or have it written. Collective: every rank.

        Raises:
            CheckpointError: this write, or the one before in the background, failed and ``on_error=stop``; or this one,
                at once and ``is_last`` of the start: there is no next one to make up for it.
        """
        self.finish()
        self.writer.start(self._take_snapshot(progress))
        if not self.writer.config.in_background:
            self.finish(stop_on_error=is_last or None)

    def finish(self, stop_on_error: bool | None = None) -> None:
        """Wait for the write in the background and remember its outcome; see :meth:`CheckpointWriter.finish`."""
        written = self.writer.finish(stop_on_error)
        if written is not None:
            self.changes.complete(written.plan)

    def must_stop(self) -> bool:
        """Whether a write in the background failed and the run is to stop, see :meth:`CheckpointWriter.must_stop`."""
        return self.writer.must_stop()

    def _take_snapshot(self, progress: Progress) -> Snapshot:
        """Collective: every rank (the sampler's state)."""
        weights, optimizer = self.train_module.store.tensors(), self.train_module.optimizer
        moments = optimizer.moment_tensors()  # once: packed ones are unpacked here
        plan = self.changes.begin(checkpoint_name(progress.step), weights, optimizer.parameters)
        state = state_of(self.train_module, progress, moments)
        state |= {"external": plan.external, "since_full": plan.since_full}
        written = plan.written
        folders = {
            WEIGHTS: own_pieces({name: tensor for name, tensor in weights.items() if name in written}),
            MOMENTS: own_pieces(moments),
        }
        frozen = frozen_tensors(self.train_module, [name for pieces in folders.values() for name in pieces])
        texts = {STATE: json.dumps(state, indent=1), CONFIG: self.config_yaml}
        keeps_best = self.train_module.config.checkpoint.keep_best
        best = checkpoint_name(progress.best_step) if keeps_best and progress.best_step is not None else None
        return Snapshot(progress.step, plan, folders, frozen, texts, best)


def frozen_tensors(train_module: TrainModule, names: Iterable[str]) -> set[str]:
    """Return which of ``names`` nothing changes in place: weights, and moments in host memory, of frozen parameters.

    A thaw gives a parameter another storage, unless its dtype stays as it was; a snapshot keeps the old one.
    """
    store, trained = train_module.store, train_module.optimizer.parameters
    frozen = {name for name in store.names if name not in trained and store.thaw_replaces(name)}
    # Optimizer state is named by its parameter and, after a dot, its own kind.
    return {name for name in names if name in frozen or name.rpartition(".")[0] in frozen}
