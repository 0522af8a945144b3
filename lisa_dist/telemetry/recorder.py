"""One object that the loop tells what happened: it writes the files, feeds the logger and moves the bar."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from lisa_dist.config import Config
from lisa_dist.distributed import is_main
from lisa_dist.telemetry.memory import current_memory_gib, peak_memory_gib
from lisa_dist.telemetry.progress import ProgressDisplay
from lisa_dist.telemetry.records import METRICS_FILE, MetricsWriter, Row, read_rows, write_summary
from lisa_dist.telemetry.sinks import build_sink


class Recorder:
    """metrics.jsonl, layers.jsonl, summary.json, the logger and the progress bar. Does nothing but on rank 0."""

    def __init__(self, config: Config, max_steps: int, first_step: int, resumed_from: list[int]) -> None:
        self.run_dir = Path(config.run.dir or ".")
        self.resumed_from = resumed_from
        self.tokens = 0  # label tokens trained on since the start of this process
        self.started = time.monotonic()
        self.writer = MetricsWriter(self.run_dir)
        self.figures: dict[str, Any] = {}  # of summary.json
        self.cut_after(first_step or -1)  # at a fresh start the evaluation of step 0 is repeated too
        self.sink = build_sink(config, self.run_dir, first_step)
        self.display = ProgressDisplay(max_steps, first_step)

    def cut_after(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``: what was recorded past it is dropped."""
        self.writer.cut_after(step)
        if is_main():
            self.figures |= figures_of(read_rows(self.run_dir / METRICS_FILE))

    def record_period(self, period: int, step: int, active_layers: list[int], scores: list[float] | None) -> None:
        """A period began: ``step`` is the first that trains these blocks."""
        self.writer.write_period(period=period, step=step, active_layers=active_layers, scores=scores)

    def record_step(self, *, tokens: int, step_seconds: float, loss: float, step: int, **figures: Any) -> None:
        """An optimizer step was made."""
        row = self.writer.write_step(
            step=step,
            loss=loss,
            tokens=tokens,
            tokens_per_second=tokens / step_seconds,
            step_seconds=step_seconds,
            memory_gib=current_memory_gib(),
            **figures,
        )
        self._show(row)
        self.figures["final_step"] = step
        self.figures["final_loss"] = loss
        self.figures["tokens_seen"] = self.figures.get("tokens_seen", 0) + tokens
        self.tokens += tokens

    def record_evaluation(self, step: int, eval_loss: float) -> None:
        """The validation set was run through the model."""
        self._show(self.writer.write_eval(step=step, eval_loss=eval_loss))
        self.figures["eval_loss"] = eval_loss
        self.figures["best_eval_loss"] = min(eval_loss, self.figures.get("best_eval_loss", eval_loss))

    def write_summary(self, exit_reason: str) -> None:
        """The run ended: ``finished``, ``signal``, or ``failed: <why>``."""
        seconds = time.monotonic() - self.started
        figures = {
            **self.figures,
            "wall_seconds": seconds,
            "peak_memory_gib": peak_memory_gib(),
            "tokens_per_second": self.tokens / seconds,
        }
        write_summary(self.run_dir, exit_reason=exit_reason, resumed_from=self.resumed_from, **figures)

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


def figures_of(rows: list[Row]) -> dict[str, Any]:
    """Return what summary.json says of the steps before a resume, by their rows of metrics.jsonl."""
    figures: dict[str, Any] = {}
    steps = [row for row in rows if "loss" in row]
    evaluations = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    if steps:
        figures |= {"final_step": steps[-1]["step"], "final_loss": steps[-1]["loss"]}
        figures["tokens_seen"] = sum(row["tokens"] for row in steps)
    if evaluations:
        figures |= {"eval_loss": evaluations[-1], "best_eval_loss": min(evaluations)}
    return figures
