"""Which rank lags, and where: what gloo's and NCCL's time-outs do not say.

Each rank notes what it does in a small file of the run directory, which others can read when this rank, or the
one that serves the process group's store, stands still. A thread watches for standstill, because NCCL ends the
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
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lisa_dist import distributed

logger = logging.getLogger(__name__)

RECORD_BYTES = 256  # a record is written over the last one, padded, in one system call
WATCH_SHARE = 0.9  # of the time-out, after which a standstill is explained in the log


class LostRankError(RuntimeError):
    """A collective failed; says where this rank waited and which ranks are behind."""


class Heartbeat:
    """This rank's note of its step and of the part of it that it works on, and the reading of everybody's."""

    def __init__(self, run_dir: Path, timeout: float) -> None:
        """Args:
        run_dir: notes are kept in ``logs/heartbeat_N.json``.
        timeout: seconds that a collective may take.
        """
        self.folder = run_dir / "logs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.timeout = timeout
        self.step = 0
        self.part = "start"
        self.beat = time.monotonic()
        self.watched = True
        self._order = 0  # counts the notes: of two ranks in one run, the smaller one is behind
        self._file = os.open(self.folder / f"heartbeat_{distributed.rank()}.json", os.O_WRONLY | os.O_CREAT, 0o666)
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
        outer = self.part
        self.watched = not may_take_long
        self._note(part)
        yield
        self.watched = True
        self._note(outer)

    def _note(self, part: str) -> None:
        self.part, self.beat = part, time.monotonic()
        self._order += 1
        record = {"step": self.step, "order": self._order, "part": part, "host": socket.gethostname()}
        text = json.dumps({**record, "time": time.time()})
        os.pwrite(self._file, text.encode()[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n", 0)

    def explain(self) -> str:
        """Return where this rank waits and which ranks are behind it, by the notes of all."""
        waits = f"rank {distributed.rank()} waited in {self.part} of step {self.step}"
        notes = {rank: self._read(rank) for rank in range(distributed.world_size())}
        known = {rank: note for rank, note in notes.items() if note is not None}
        most = max((note["order"] for note in known.values()), default=0)
        behind = [rank for rank, note in known.items() if note["order"] < most]
        silent = [f"rank {rank} left no note" for rank, note in notes.items() if note is None]
        if not behind and not silent:
            return f"{waits}; every rank got as far"
        now = time.time()
        lagging = [
            f"rank {rank} on {known[rank]['host']} is behind, last seen {now - known[rank]['time']:.0f} s ago "
            f"in {known[rank]['part']} of step {known[rank]['step']}"
            for rank in behind
        ]
        return f"{waits}; {'; '.join([*lagging, *silent])}"

    def explained(self, error: BaseException) -> BaseException:
        """Return a :class:`LostRankError` in place of an error of a collective, any other error as it is."""
        text = str(error)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
            return LostRankError(f"{self.explain()} ({text.splitlines()[0]})")
        return error

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            note = json.loads((self.folder / f"heartbeat_{rank}.json").read_text())
            return note if {"step", "order", "part", "host", "time"} <= note.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _watch(self) -> None:
        """Explain a standstill once; to be sure of the log, before the collective's own time-out ends the process."""
        while not self._stop.wait(min(1.0, self.timeout / 20)):
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
