"""Which rank lags, and where: what gloo's and NCCL's time-outs do not say.

Each rank keeps in memory what it does, and a thread writes that every few seconds, with a sign of life, to a small
file of the run directory: others can read it when this rank, or the one that serves the process group's store, stands
still, and one that was stopped or whose machine is gone differs from one that waits. The training thread itself
touches no file, which may lie on a slow file system. The thread also watches for standstill, because NCCL ends the
process from a thread of its own, and Python's main thread gets no exception.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from lisa_dist.config import StorageError
from lisa_dist.config.paths import refusal
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed

logger = logging.getLogger(__name__)

KEYS = ("step", "order", "part", "host", "noted", "alive")  # of a record
# Of the parts that are noted, those that the seconds of a step consist of; data have seconds of their own.
STEP_PARTS = ("forward", "backward", "reduction of the loss", "optimizer", "the wait for the device")
RECORD_BYTES = 320  # a record is written over the last one, padded, in one system call
WATCH_SHARE = 0.8  # of the time-out, after which a standstill is explained in the log: reading all notes takes time
TICK_SHARE = 0.05  # of the time-out: how often a rank writes its note
LONGEST_TICK = 2.0  # seconds: so old may the note be of a rank that lives
STILL_SHARE = 0.25  # of the time-out, without a sign of life, after which a rank stands still


@dataclass(frozen=True)
class Note:
    """What a rank works on. A new one takes the place of the old in one assignment, which any thread may read."""

    step: int
    part: str
    order: int  # counts the notes: of two ranks in one run, the smaller one is behind
    noted: float  # when this began, by the clock that others have too
    beat: float  # the same by this process' own


class LostRankError(RuntimeError):
    """A collective failed; says where this rank waited and which ranks are behind."""


class Heartbeat:
    """This rank's note of its step and of the part of it that it works on, and the reading of everybody's."""

    def __init__(self, run: RunDirectory, timeout: float, max_steps: int | None = None) -> None:
        """Args:
        run: notes are kept in its ``logs/heartbeat_N.json``.
        timeout: seconds that a collective may take.
        max_steps: of the whole run, for whoever reads the notes to see how far it is; None: not known.
        """
        self.max_steps = max_steps
        self.run = run
        run.logs.mkdir(parents=True, exist_ok=True)
        self.timeout = timeout
        self.tick = min(TICK_SHARE * timeout, LONGEST_TICK)  # seconds
        self.seconds: dict[str, float] = {}  # that the host spent in each part of steps, since they were last taken
        self.note = Note(0, "start", 0, time.time(), time.monotonic())
        self.watched = True
        self._file = os.open(run.heartbeat(distributed.rank()), os.O_WRONLY | os.O_CREAT, 0o666)
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def begin_step(self, step: int, *, may_take_long: bool = False) -> None:
        """Note that optimizer step ``step`` (counted from 1) begins; a first one may compile, and so take long."""
        self._begin("between steps", step)
        self.watched = not may_take_long

    @contextmanager
    def phase(self, part: str, *, may_take_long: bool = False) -> Iterator[None]:
        """Note that the body works on ``part`` of the step: ``forward``, ``backward``, ``checkpoint`` and so on.

        Args:
            may_take_long: longer than one collective may, so that no standstill is suspected.
        """
        outer, watched = self.note.part, self.watched
        self._begin(part, self.note.step)
        self.watched = watched and not may_take_long  # after the note, for the watcher measures from it
        yield  # where the body raises, the note stays: it says where
        self._begin(outer, self.note.step)
        self.watched = watched

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds that the host spent in each part of the steps since the last call, and forget them."""
        taken, self.seconds = self.seconds, {}
        return {part: taken[part] for part in STEP_PARTS if part in taken}

    def _begin(self, part: str, step: int) -> None:
        ended = self.note
        self.seconds[ended.part] = self.seconds.get(ended.part, 0.0) + time.monotonic() - ended.beat
        self.note = Note(step, part, self.note.order + 1, time.time(), time.monotonic())

    def _write(self) -> None:
        with self._writing:  # the last of two writers has seen what the other has
            about = {**asdict(self.note), "host": socket.gethostname(), "alive": time.time()}
            record = {**{key: about[key] for key in KEYS}, "max_steps": self.max_steps}
            with suppress(OSError):  # a full disk is told by what writes the record
                os.pwrite(self._file, json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n", 0)

    def place(self) -> str:
        """Return what this rank works on: ``forward of step 3``."""
        note = self.note
        return f"{note.part} of step {note.step}" if note.step else f"{note.part} before the first step"

    def doing(self) -> tuple[str, float]:
        """Return the part that this rank works on, and for how many seconds. Any thread may ask."""
        note = self.note
        return note.part, time.monotonic() - note.beat

    def explain(self) -> str:
        """Return where this rank waits, and which ranks are behind it or stand still, by the notes of all.

        Takes two ticks at most: so long every rank that lives has to write where it is now.
        """
        self._write()
        notes = self._fresh_notes()
        most = max((note["order"] for note in notes.values() if note is not None), default=0)
        own = self.note
        found = [f"rank {distributed.rank()} waited in {own.part} of step {own.step}"]
        for rank, note in notes.items():
            if note is None:
                found.append(f"rank {rank} left no note")
                continue
            where = f"in {note['part']} of step {note['step']}"
            still = time.time() - note["alive"]
            if still > STILL_SHARE * self.timeout:
                found.append(f"rank {rank} on {note['host']} stands still, last seen {still:.0f} s ago {where}")
            elif note["order"] < most:
                since = time.time() - note["noted"]
                found.append(f"rank {rank} on {note['host']} is behind, for {since:.0f} s {where}")
        return "; ".join(found if len(found) > 1 else [*found, "no rank is known to be behind it"])

    def explained(self, error: BaseException) -> BaseException:
        """Return what an error means in the midst of a run, most errors as they are.

        One of a collective is a :class:`LostRankError`. A path that is refused now was not when the run began, so that
        it is no mistake of the command: a :class:`StorageError`.
        """
        text = str(error)
        if (refused := refusal(error)) is not None:
            return StorageError(f"{refused} (in {self.place()})")
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
            return LostRankError(f"{self.explain()} ({text.splitlines()[0]})")
        return error

    def _fresh_notes(self) -> dict[int, dict[str, Any] | None]:
        """Return every rank's note: one that was written since, by every rank that still writes."""
        before = {rank: self._read(rank) for rank in range(distributed.world_size())}
        notes, end = dict(before), time.monotonic() + 2 * self.tick
        waited_for = set(notes) - {distributed.rank()}
        while waited_for and time.monotonic() < end:
            time.sleep(self.tick / 20)
            notes |= {rank: self._read(rank) for rank in waited_for}
            waited_for = {rank for rank in waited_for if notes[rank] is None or notes[rank] == before[rank]}
        return notes

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            note = json.loads(self.run.heartbeat(rank).read_text())
            return note if set(KEYS) <= note.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _watch(self) -> None:
        """Show that this rank lives, and explain a standstill before the collective's own time-out ends the process."""
        explained: Note | None = None
        while not self._stop.wait(self.tick):
            self._write()
            note, still = self.note, time.monotonic() - self.note.beat
            if self.watched and note is not explained and still > WATCH_SHARE * self.timeout:
                logger.warning("no progress for %.0f s: %s", still, self.explain())
                explained = note

    def __enter__(self) -> Heartbeat:
        self._begin("start", 0)
        self._write()
        self._watcher.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._write()  # where this rank ended, for those that explain what they waited for
        os.close(self._file)
