"""Writing checkpoints: at once or in the background, whole or only what changed.

Every rank writes its own files under another name; when all have, rank 0 writes the manifest and renames the
directory. So a directory of the name ``step_...`` is complete, whenever the program ends. No file is a pickle.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.manifest import (
    CONFIG,
    MOMENTS,
    STATE,
    WEIGHTS,
    checkpoint_name,
    describe_file,
    remove_old,
    write_manifest,
)
from lisa_dist.checkpoint.shards import Piece, WrittenFile, own_pieces, write_pieces
from lisa_dist.checkpoint.staging import SideStream, StagingMemory
from lisa_dist.checkpoint.state import Progress, state_of
from lisa_dist.config import CheckpointConfig
from lisa_dist.method.module import TrainModule
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import write_atomically

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are as they were."""


@dataclass
class Snapshot:
    """What one checkpoint will hold of this rank."""

    step: int
    folders: dict[str, dict[str, Piece]]  # weights and moments
    steady: set[str]  # of these, what nothing changes in place while the checkpoint is written
    texts: dict[str, str]  # further files by name, written by rank 0
    holders: dict[str, str]  # parameter name -> name of the checkpoint that then holds it


class CheckpointSaver:
    """Writes the checkpoints of one run and remembers what the last one holds.

    With ``checkpoint.full_every=n`` every n-th is full; those between hold the weights that trained since the
    checkpoint before, and name the checkpoints that hold the others. With ``checkpoint.async`` a thread copies what
    trains to host memory, for which the optimizer waits before its next step, then writes while training goes on;
    what is frozen it reads where it is. The outcome is the same on every rank by an agreement of the threads.
    """

    def __init__(self, train_module: TrainModule, directory: Path, config_yaml: str) -> None:
        """Collective: every rank (a group for the agreements).

        Args:
            train_module: what is saved.
            directory: where checkpoints lie.
            config_yaml: the run's configuration, which each checkpoint repeats.
        """
        self.train_module = train_module
        self.directory = directory
        self.config_yaml = config_yaml
        self.config: CheckpointConfig = train_module.config.checkpoint
        self.holders: dict[str, str] = {}  # of the newest complete checkpoint; empty: the next one is full
        self.since_full = 0  # checkpoints since the last full one
        self.changed: set[str] = set()  # parameters whose weights the newest complete checkpoint may not hold
        self.changed_since_snapshot: set[str] = set()
        self.staging = StagingMemory()
        self.side_stream = SideStream()
        self.copied = threading.Event()  # what training changes is in host memory
        self.copied.set()
        train_module.optimizer.before_change = self.copied.wait
        self.group = distributed.thread_group(train_module.config.parallel.timeout)
        self.thread: threading.Thread | None = None
        self.writing: Snapshot | None = None
        self.failure: str | None = None  # of the write that was last in the background

    def note_trained(self) -> None:
        """Remember that the weights that train now change; to be called after every switch."""
        self.changed |= set(self.train_module.optimizer.parameters)
        self.changed_since_snapshot |= set(self.train_module.optimizer.parameters)

    def continue_from(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Take the checkpoint that a run goes on from as the one that the next may build on."""
        elsewhere = {name: holder for holder, names in state["elsewhere"].items() for name in names}
        self.holders = {name: elsewhere.get(name, checkpoint.name) for name in self.train_module.store.tensors()}
        self.since_full = state["since_full"]
        self.changed = set(self.train_module.optimizer.parameters)
        self.changed_since_snapshot = set()

    def save(self, progress: Progress) -> None:
        """Write the checkpoint of ``progress.step``, or have it written. Collective: every rank.

        Raises:
            CheckpointError: this write, or the one before in the background, failed and ``on_error=stop``.
        """
        self.finish()
        self.writing = self._take(progress)
        if self.config.in_background:
            self.copied.clear()
            self.side_stream.follow()
            self.thread = threading.Thread(
                target=self._write_in_background, args=(self.writing,), name="checkpoint", daemon=True
            )
            self.thread.start()
        else:
            self._write(self.writing)
            self.finish()

    def finish(self, stop_on_error: bool | None = None) -> None:
        """Wait for the write in the background and take note of its outcome. No communication by this thread.

        Args:
            stop_on_error: overrides ``checkpoint.on_error``.

        Raises:
            CheckpointError: it failed, on every rank alike.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        snapshot, self.writing = self.writing, None
        if snapshot is None:
            return
        if self.failure is None:
            self.holders = snapshot.holders
            self.since_full = json.loads(snapshot.texts[STATE])["since_full"]
            self.changed = set(self.changed_since_snapshot)
            return
        failure, self.failure = self.failure, None
        if self.config.on_error == "stop" if stop_on_error is None else stop_on_error:
            raise CheckpointError(failure)
        logger.warning("%s; the run goes on without it (checkpoint.on_error=warn)", failure)

    def must_stop(self) -> bool:
        """Whether a write in the background failed and the run is to stop; the next :meth:`finish` says why.

        Ranks may learn of it a step apart.
        """
        ended = self.thread is not None and not self.thread.is_alive()
        if not ended or self.failure is None:
            return False
        if self.config.on_error == "warn":
            self.finish()
            return False
        return True

    def _take(self, progress: Progress) -> Snapshot:
        """Collective: every rank (the sampler's state)."""
        weights = self.train_module.store.tensors()
        trained = set(self.train_module.optimizer.parameters)
        name = checkpoint_name(progress.step)
        full = not self.holders or self.since_full + 1 >= self.config.full_every
        written = {key for key in weights if full or key in self.changed | trained or key not in self.holders}
        # A checkpoint of the same step is replaced, so what it holds is written anew.
        written |= {key for key, holder in self.holders.items() if holder == name}
        holders = {key: name if key in written else self.holders[key] for key in weights}
        elsewhere: dict[str, list[str]] = {}
        for key, holder in holders.items():
            if holder != name:
                elsewhere.setdefault(holder, []).append(key)
        state = state_of(self.train_module, progress)
        state |= {"elsewhere": elsewhere, "since_full": 0 if full else self.since_full + 1}
        self.changed_since_snapshot = set(trained)
        folders = {
            WEIGHTS: own_pieces({key: weights[key] for key in weights if key in written}),
            MOMENTS: own_pieces(self.train_module.optimizer.moment_tensors()),
        }
        steady = self._steady(name for pieces in folders.values() for name in pieces)
        texts = {STATE: json.dumps(state, indent=1), CONFIG: self.config_yaml}
        return Snapshot(progress.step, folders, steady, texts, holders)

    def _steady(self, names: Iterable[str]) -> set[str]:
        """Return the weights, and moments in host memory, of frozen parameters.

        A thaw gives a parameter another storage, unless its dtype stays as it was; a snapshot keeps the old one.
        """
        train_module = self.train_module
        store, trained = train_module.store, train_module.optimizer.parameters
        frozen = {name for name in store.names if name not in trained and store.thaw_replaces(name)}
        return {name for name in names if name in frozen or name.rpartition(".")[0] in frozen}

    def _stage(self, snapshot: Snapshot) -> None:
        """Copy to host memory what is not steady, and let go of it."""
        changing = {
            (folder, name): piece
            for folder, pieces in snapshot.folders.items()
            for name, piece in pieces.items()
            if name not in snapshot.steady
        }
        for (folder, name), copy in self.staging.copy(changing).items():
            snapshot.folders[folder][name] = copy

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            with self.side_stream.entered():
                self._write(snapshot)
        except Exception as error:  # a rank is gone: the main thread learns it in its own collective
            self.failure = f"the checkpoint of step {snapshot.step} could not be written: {error}"
        finally:
            self.copied.set()

    def _begin(self, snapshot: Snapshot, partial: Path) -> None:
        if self.config.in_background:
            self._stage(snapshot)
            self.copied.set()
        if distributed.is_main():
            _make_folders(partial)

    def _write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint and leave the outcome in ``self.failure``. Collective: every rank, in this group."""
        partial = self.directory / f".{checkpoint_name(snapshot.step)}.partial"
        self.failure = self._agree(lambda: self._begin(snapshot, partial), snapshot.step)
        files: dict[str, WrittenFile] = {}
        if self.failure is None:
            self.failure = self._agree(lambda: files.update(_write_own_files(snapshot, partial)), snapshot.step)
        if self.failure is None:
            gathered = distributed.gather_objects(files, self.group)
            everything = {name: file for of_rank in gathered for name, file in of_rank.items()}
            self.failure = self._agree(lambda: self._complete(snapshot, partial, everything), snapshot.step)
        if self.failure is not None and distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, snapshot: Snapshot, partial: Path, files: dict[str, WrittenFile]) -> None:
        if not distributed.is_main():
            return
        final = self.directory / checkpoint_name(snapshot.step)
        write_manifest(partial, files, sorted(set(snapshot.holders.values()) - {final.name}))
        for folder in (partial / WEIGHTS, partial / MOMENTS, partial):
            _flush_directory(folder)
        replaced = self.directory / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            final.replace(replaced)
        partial.replace(final)
        _flush_directory(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        remove_old(self.directory, final, self.config.keep)

    def _agree(self, action: Callable[[], object], step: int) -> str | None:
        """Do something with files on every rank; returns the first failure of any rank. Collective: every rank."""

        def attempt() -> str | None:
            try:
                action()
            except OSError as error:
                where = f" ({error.filename})" if error.filename else ""
                return f"rank {distributed.rank()}: {error.strerror or error}{where}"
            except Exception as error:  # the other ranks wait for this one's word
                logger.exception("writing the checkpoint of step %d", step)
                return f"rank {distributed.rank()}: {type(error).__name__}: {error}"
            return None

        failures = [text for text in distributed.gather_outcomes(attempt, self.group) if text is not None]
        return f"the checkpoint of step {step} could not be written: {failures[0]}" if failures else None


def remove_leftovers(directory: Path) -> None:
    """Remove what writes that never ended left behind; where a replacement was cut short, the old one returns."""
    for replaced in directory.glob(".step_*.replaced"):
        final = directory / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not final.exists():
            replaced.replace(final)
    for leftover in [*directory.glob(".step_*.partial"), *directory.glob(".step_*.replaced")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _make_folders(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in (WEIGHTS, MOMENTS):
        (partial / folder).mkdir(parents=True)


def _write_own_files(snapshot: Snapshot, partial: Path) -> dict[str, WrittenFile]:
    written = {}
    for folder, pieces in snapshot.folders.items():
        name = f"{folder}/rank_{distributed.rank():05d}.safetensors"
        written[name] = write_pieces(pieces, partial / name)
    if distributed.is_main():
        for name, text in snapshot.texts.items():
            write_atomically(partial / name, text)
            written[name] = describe_file(partial / name)
    return written


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
