"""Which rank lags, and where: what gloo's and NCCL's time-outs do not say.

Each rank notes what it does in a small file of the run directory, which others can read when this rank, or the
one that serves the process group's store, stands still. A thread notes that the process lives, so that one that
was stopped or whose machine is gone differs from one that waits; and it watches for standstill, because NCCL ends
the process from a thread of its own, and Python's main thread gets no exception.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed

logger = logging.getLogger(__name__)

RECORD_BYTES = 256  # a record is written over the last one, padded, in one system call
WATCH_SHARE = 0.9  # of the time-out, after which a standstill is explained in the log
TICK_SHARE = 0.05  # of the time-out: how often a rank that waits shows that it lives
STILL_SHARE = 0.25  # of the time-out, without a sign of life, after which a rank stands still


class LostRankError(RuntimeError):
    """A collective failed; says where this rank waited and which ranks are behind."""


class Heartbeat:
    """This rank's note of its step and of the part of it that it works on, and the reading of everybody's."""

    def __init__(self, run_dir: Path, timeout: float) -> None:
        """Args:
        run_dir: notes are kept in ``logs/heartbeat_N.json``.
        timeout: seconds that a collective may take.
        """
        self.folder = RunDirectory(run_dir).logs
        self.folder.mkdir(parents=True, exist_ok=True)
        self.timeout = timeout
        self.step = 0
        self.part = "start"
        self.beat = time.monotonic()
        self.watched = True
        self.noted = time.time()
        self.order = 0  # counts the notes: of two ranks in one run, the smaller one is behind
        self._file = os.open(self.folder / f"heartbeat_{distributed.rank()}.json", os.O_WRONLY | os.O_CREAT, 0o666)
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def begin_step(self, step: int) -> None:
        """Note that optimizer step ``step`` (counted from 1) begins."""
        self.step = step
        self._note("between steps")

    @contextmanager
    def phase(self, part: str, *, may_take_long: bool = False) -> Iterator[None]:
        """Note that the body works on ``part`` of the step: ``forward``, ``backward``, ``checkpoint`` and so on.

        Args:
            may_take_long: longer than one collective may, so that no standstill is suspected.
        """
        outer, watched = self.part, self.watched
        self._note(part)
        self.watched = not may_take_long  # after the note, for the watcher measures from it
        yield  # where the body raises, the note stays: it says where
        self._note(outer)
        self.watched = watched

    def _note(self, part: str) -> None:
        self.part, self.beat = part, time.monotonic()
        self.noted = time.time()
        self.order += 1
        self._write()

    def _write(self) -> None:
        with self._writing:  # the last of two writers has seen what the other has
            record = {
                "step": self.step,
                "order": self.order,
                "part": self.part,
                "host": socket.gethostname(),
                "noted": self.noted,
                "alive": time.time(),
            }
            os.pwrite(self._file, json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n", 0)

    def place(self) -> str:
        """Return what this rank works on: ``forward of step 3``."""
        return f"{self.part} of step {self.step}" if self.step else f"{self.part} before the first step"

    def explain(self) -> str:
        """Return where this rank waits, and which ranks are behind it or stand still, by the notes of all."""
        notes = {rank: self._read(rank) for rank in range(distributed.world_size())}
        most = max((note["order"] for note in notes.values() if note is not None), default=0)
        found = [f"rank {distributed.rank()} waited in {self.part} of step {self.step}"]
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
        """Return a :class:`LostRankError` in place of an error of a collective, any other error as it is."""
        text = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
            return LostRankError(f"{self.explain()} ({text.splitlines()[0]})")
        return error

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            note = json.loads((self.folder / f"heartbeat_{rank}.json").read_text())
            return note if {"step", "order", "part", "host", "noted", "alive"} <= note.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _watch(self) -> None:
        """Show that this rank lives, and explain a standstill before the collective's own time-out ends the process."""
        while not self._stop.wait(TICK_SHARE * self.timeout):
            self._write()
            if self.watched and time.monotonic() - self.beat > WATCH_SHARE * self.timeout:
                logger.warning("no progress for %.0f s: %s", time.monotonic() - self.beat, self.explain())
                self.beat = time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._note("start")
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()
        os.close(self._file)
