"""The run's own record, written: metrics.jsonl, layers.jsonl, summary.json. On rank 0 only."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lisa_dist.config import UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import is_main
from lisa_dist.runtime.files import naming, to_json, write_atomically
from lisa_dist.runtime.redaction import hide_secrets
from lisa_dist.telemetry.history import MetricsRow, read_rows, read_summary

logger = logging.getLogger(__name__)


class RowWriter:
    """Appends rows to metrics.jsonl, layers.jsonl and events.jsonl; a row is on disk when the call returns.

    On ranks other than 0 nothing is opened or written.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._files: dict[Path, TextIO] = {}
        if is_main():
            run.path.mkdir(parents=True, exist_ok=True)
            self._open()

    def append(self, path: Path, row: MetricsRow) -> None:
        """Append a row to ``run.metrics``, ``run.layers`` or ``run.events``."""
        if path in self._files:
            with naming(path):
                self._files[path].write(to_json(row) + "\n")
                self._files[path].flush()

    def cut_after(self, step: int) -> None:
        """Drop what was recorded past the checkpoint of ``step``, before a run goes on from it.

        Rows of metrics.jsonl and events.jsonl with a later step go, and so do the periods that began later;
        so does a last line that was torn by a kill. Each file is replaced at once or not at all.

        Raises:
            UserError: a row is not one.
        """
        if not self._files:
            return
        for file in self._files.values():
            file.close()
        for path in self._files:
            try:
                kept = [row for row in read_rows(path) if row["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"run.dir={self.run.path}: {path.name} is damaged, fix or move it ({error})") from error
            write_atomically(path, "".join(to_json(row) + "\n" for row in kept))
        self._open()

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with suppress(OSError):  # of a row that could not be written, which is told
                file.close()
        self._files = {}

    def _open(self) -> None:
        paths = (self.run.metrics, self.run.layers, self.run.events)
        self._files = {path: path.open("a", encoding="utf-8") for path in paths}


def write_summary(run: RunDirectory, *, exit_reason: str, resumed_from: list[int], **known: Any) -> None:
    """Write summary.json at once or not at all, on rank 0.

    Args:
        run: where.
        exit_reason: ``finished``, ``signal``, or ``failed: <why>``.
        resumed_from: the checkpoint steps this run went on from, oldest first.
        known: what else is known at the end: ``final_loss``, ``wall_seconds`` and so on.
    """
    if not is_main():
        return
    summary = {"exit_reason": hide_secrets(exit_reason), "resumed_from": resumed_from, **known}
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.summary, to_json(summary, indent=2) + "\n")


def known_summary(run: RunDirectory) -> MetricsRow:
    """Return what summary.json says before it is written anew: {} where none or a damaged one is, which is told."""
    try:
        return read_summary(run) or {}
    except (ValueError, OSError) as error:
        logger.warning("what the run's summary said is lost, for it is damaged: %s", error)
        return {}


def record_failure(run: RunDirectory, message: str) -> None:
    """Write into summary.json that the run failed, beside what it says already."""
    write_summary(run, **{"resumed_from": [], **known_summary(run), "exit_reason": f"failed: {message}"})


def summary_is_new(run: RunDirectory, started: float) -> bool:
    """Whether summary.json was written since ``started``, in seconds since the epoch."""
    return run.summary.exists() and run.summary.stat().st_mtime >= started
