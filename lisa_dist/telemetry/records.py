"""The run's own record: metrics.jsonl, layers.jsonl, summary.json. Written on rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lisa_dist.config import UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import is_main
from lisa_dist.runtime.files import to_json, write_atomically
from lisa_dist.runtime.redaction import hide_secrets

MetricsRow = dict[str, Any]


class MetricsWriter:
    """Appends rows to metrics.jsonl and layers.jsonl; a row is on disk when the call returns.

    On ranks other than 0 nothing is opened or written. Times are in seconds, memory in GiB.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._metrics: TextIO | None = None
        self._layers: TextIO | None = None
        if is_main():
            self.run.path.mkdir(parents=True, exist_ok=True)
            self._open()

    def write_step(
        self,
        *,
        step: int,
        epoch: float,
        period: int,
        active_layers: list[int],
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        label_tokens: int,
        step_seconds: float,
        data_seconds: float,
        peak_memory_gib: float,
        steps: int = 1,
        **more: Any,
    ) -> MetricsRow:
        """Write and return the row of one optimizer step, and of those since the row before it.

        Args:
            step, epoch, period, active_layers, loss, lr, grad_norm: of the step.
            tokens: of the global batches of all these steps, padding left out.
            label_tokens: those of them that carry loss.
            step_seconds: of a step in the mean, from the wait for the data to the optimizer's step.
            data_seconds: of these, waiting for the data.
            peak_memory_gib: the most that rank 0 held at a time in these steps.
            steps: how many they are.
            more: further keys, such as ``mfu``.
        """
        row = {
            "step": step,
            "epoch": epoch,
            "period": period,
            "active_layers": active_layers,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "label_tokens": label_tokens,
            "tokens_per_second": tokens / (steps * step_seconds),
            "label_tokens_per_second": label_tokens / (steps * step_seconds),
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "peak_memory_gib": peak_memory_gib,
            **more,
        }
        _append(self._metrics, row)
        return row

    def write_eval(self, *, step: int, eval_loss: float, **more: Any) -> MetricsRow:
        """Write and return the row of one validation, which has ``eval_loss`` and no ``loss``."""
        row = {"step": step, "eval_loss": eval_loss, **more}
        _append(self._metrics, row)
        return row

    def write_period(
        self, *, period: int, step: int, active_layers: list[int], num_blocks: int, scores: list[float] | None = None
    ) -> MetricsRow:
        """Write and return the row of one period: ``step`` is the first that trains these of ``num_blocks`` blocks."""
        row: MetricsRow = {"period": period, "step": step, "active_layers": active_layers, "num_blocks": num_blocks}
        if scores is not None:
            row["scores"] = scores
        _append(self._layers, row)
        return row

    def cut_after(self, step: int) -> None:
        """Drop what was recorded past the checkpoint of ``step``, before a run goes on from it.

        Rows of metrics.jsonl with a later step go, and so do the periods of layers.jsonl that began later;
        so does a last line that was torn by a kill. Each file is replaced at once or not at all.

        Raises:
            UserError: a row is not one.
        """
        if self._metrics is None or self._layers is None:
            return
        self.close()
        for path in (self.run.metrics, self.run.layers):
            try:
                kept = [row for row in read_rows(path) if row["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"run.dir={self.run.path}: {path.name} is damaged, fix or move it ({error})") from error
            write_atomically(path, "".join(to_json(row) + "\n" for row in kept))
        self._open()

    def close(self) -> None:
        """Close both files."""
        for file in (self._metrics, self._layers):
            if file is not None:
                file.close()
        self._metrics = self._layers = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        self._metrics = self.run.metrics.open("a", encoding="utf-8")
        self._layers = self.run.layers.open("a", encoding="utf-8")


def write_summary(run: RunDirectory, *, exit_reason: str, resumed_from: list[int], **figures: Any) -> None:
    """Write summary.json at once or not at all, on rank 0.

    Args:
        exit_reason: ``finished``, ``signal``, or ``failed: <why>``.
        resumed_from: the checkpoint steps this run went on from, oldest first.
        figures: what is known at the end: ``final_loss``, ``best_eval_loss``, ``wall_seconds``,
            ``trained_parameters``, ``persistent_bytes`` and so on.
    """
    if not is_main():
        return
    summary = {"exit_reason": hide_secrets(exit_reason), "resumed_from": resumed_from, **figures}
    run.path.mkdir(parents=True, exist_ok=True)
    write_atomically(run.summary, to_json(summary, indent=2) + "\n")


def read_rows(path: str | Path) -> list[MetricsRow]:
    """Return the rows of a JSON-lines file, [] where there is none; a torn last line is left out.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def read_summary(run: RunDirectory) -> MetricsRow | None:
    """Return summary.json as a dict, or None where there is none."""
    return json.loads(run.summary.read_text(encoding="utf-8")) if run.summary.exists() else None


def _append(file: TextIO | None, row: MetricsRow) -> None:
    if file is not None:
        file.write(to_json(row) + "\n")
        file.flush()
