"""One object that the loop tells what happened: it writes the files, feeds the logger and moves the bar."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lisa_dist.config import Config
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import is_main
from lisa_dist.telemetry.memory import peak_memory_gib, reset_peak_memory
from lisa_dist.telemetry.progress import ProgressDisplay
from lisa_dist.telemetry.records import MetricsRow, MetricsWriter, read_rows, read_summary, write_summary
from lisa_dist.telemetry.sinks import build_sink

SPEEDS = ("tokens_per_second", "label_tokens_per_second")
OF_THE_FIRST_STEP = (
    "trained_parameters",
    "persistent_bytes",
)  # kept by a resume that has nothing to do


@dataclass
class Counted:
    """What the steps since the last row of metrics.jsonl add up to."""

    steps: int = 0
    tokens: int = 0
    label_tokens: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    switch_seconds: float | None = None  # None: no period began
    flops: float | None = None  # None: not known
    peak_memory_gib: float = 0.0


class Recorder:
    """metrics.jsonl, layers.jsonl, summary.json, the logger and the progress bar. Does nothing but on rank 0."""

    def __init__(
        self,
        config: Config,
        max_steps: int,
        *,
        num_blocks: int,
        started: float,
        first_step: int = 0,
        resumed_from: list[int] | None = None,
    ) -> None:
        """Open the files of ``run.dir``.

        Args:
            config: names them, and the logger.
            max_steps: of the whole run.
            num_blocks: of the model.
            started: when this process began with the run, by ``time.monotonic``.
            first_step: steps already done, where the run goes on.
            resumed_from: the checkpoint steps that the run went on from.
        """
        self.run = RunDirectory.of(config)
        self.resumed_from = resumed_from or []
        self.started = started
        self.num_blocks = num_blocks
        self.peak_memory_gib = 0.0  # until the step that is under way
        self.speeds: dict[str, list[float]] = {key: [] for key in SPEEDS}  # a figure a row
        self.counted = Counted()
        self.writer = MetricsWriter(self.run)
        self.figures: dict[str, Any] = {"num_blocks": num_blocks}  # of summary.json
        if first_step and is_main():
            known = read_summary(self.run) or {}
            self.figures |= {key: known[key] for key in OF_THE_FIRST_STEP if key in known}
        self.cut_after(first_step or -1)  # at a fresh start the evaluation of step 0 is repeated too
        self.sink = build_sink(config, self.run, first_step)
        self.display = ProgressDisplay(max_steps, first_step)

    def cut_after(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``: what was recorded past it is dropped."""
        self.writer.cut_after(step)
        self.counted = Counted()
        if is_main():
            rows = read_rows(self.run.metrics)
            self.figures |= figures_of(rows)
            self.speeds = {key: [row[key] for row in rows if row.get(key) is not None] for key in SPEEDS}

    def record_period(self, period: int, step: int, active_layers: list[int], scores: list[float] | None) -> None:
        """A period began: ``step`` is the first that trains these blocks."""
        self.writer.write_period(
            period=period, step=step, active_layers=active_layers, num_blocks=self.num_blocks, scores=scores
        )

    def begin_step(self) -> None:
        """What is in memory from here on is that of the step."""
        if is_main():
            self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib())
            reset_peak_memory()

    def count_step(
        self,
        *,
        tokens: int,
        label_tokens: int,
        step_seconds: float,
        data_seconds: float,
        switch_seconds: float | None = None,
        flops: float | None = None,
    ) -> None:
        """An optimizer step was made: add it to what the next row holds; see :meth:`MetricsWriter.write_step`."""
        counted = self.counted
        counted.steps += 1
        counted.tokens += tokens
        counted.label_tokens += label_tokens
        counted.step_seconds += step_seconds
        counted.data_seconds += data_seconds
        if switch_seconds is not None:
            counted.switch_seconds = (counted.switch_seconds or 0.0) + switch_seconds
        if flops is not None:
            counted.flops = (counted.flops or 0.0) + flops
        counted.peak_memory_gib = max(counted.peak_memory_gib, peak_memory_gib())
        self.figures["tokens_seen"] = self.figures.get("tokens_seen", 0) + tokens
        self.figures["label_tokens_seen"] = self.figures.get("label_tokens_seen", 0) + label_tokens

    def record_step(self, *, step: int, loss: float, peak_flops: float | None = None, **figures: Any) -> None:
        """Write the row of the last step that was counted; the others since the row before have none.

        Args:
            step, loss, figures: of this step, see :meth:`MetricsWriter.write_step`.
            peak_flops: what all ranks together could do in a second; None: not known.
        """
        counted, self.counted = self.counted, Counted()
        if counted.switch_seconds is not None:
            figures["switch_seconds"] = counted.switch_seconds
        if counted.flops is not None and peak_flops is not None:
            figures["mfu"] = counted.flops / counted.step_seconds / peak_flops
        row = self.writer.write_step(
            step=step,
            loss=loss,
            tokens=counted.tokens,
            label_tokens=counted.label_tokens,
            step_seconds=counted.step_seconds / counted.steps,
            data_seconds=counted.data_seconds / counted.steps,
            peak_memory_gib=counted.peak_memory_gib,
            steps=counted.steps,
            **figures,
        )
        self._show(row)
        for key in SPEEDS:
            self.speeds[key].append(row[key])
        self.figures |= {"final_step": step, "final_loss": loss}

    def record_evaluation(self, step: int, eval_loss: float) -> None:
        """The validation set was run through the model."""
        self._show(self.writer.write_eval(step=step, eval_loss=eval_loss))
        self.figures["eval_loss"] = eval_loss
        self.figures["best_eval_loss"] = min(eval_loss, self.figures.get("best_eval_loss", eval_loss))

    def write_summary(self, exit_reason: str) -> None:
        """The run ended: ``finished``, ``signal``, or ``failed: <why>``.

        Speeds are medians of the steps, also of those before a resume; wall time is that of this process, loading,
        switches, evaluations and checkpoints included.
        """
        figures = {
            **self.figures,
            "wall_seconds": time.monotonic() - self.started,
            "peak_memory_gib": max(self.peak_memory_gib, peak_memory_gib()),
            **{key: statistics.median(values) for key, values in self.speeds.items() if values},
        }
        write_summary(self.run, exit_reason=exit_reason, resumed_from=self.resumed_from, **figures)

    def _show(self, row: dict[str, Any]) -> None:
        self.sink.log(row)
        self.display.update(row)

    def __enter__(self) -> Recorder:
        self.display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.display.__exit__(kind, error, traceback)
        self.sink.close()
        self.writer.close()


def figures_of(rows: list[MetricsRow]) -> dict[str, Any]:
    """Return what summary.json says of the steps before a resume, by their rows of metrics.jsonl."""
    figures: dict[str, Any] = {}
    steps = [row for row in rows if "loss" in row]
    evaluations = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    if steps:
        figures |= {"final_step": steps[-1]["step"], "final_loss": steps[-1]["loss"]}
        figures["tokens_seen"] = sum(row["tokens"] for row in steps)
        figures["label_tokens_seen"] = sum(row["label_tokens"] for row in steps)
    if evaluations:
        figures |= {"eval_loss": evaluations[-1], "best_eval_loss": min(evaluations)}
    return figures
