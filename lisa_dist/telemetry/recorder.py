"""One object that the loop tells what happened: it writes the files, feeds the logger and moves the bar."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping
from typing import Any

from lisa_dist.config import Config
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import is_main
from lisa_dist.telemetry.history import MetricsRow, read_rows
from lisa_dist.telemetry.memory import allocator_retries, peak_memory_gib, reset_peak_memory
from lisa_dist.telemetry.progress import Doing, ProgressDisplay
from lisa_dist.telemetry.records import RowWriter, known_summary, write_summary
from lisa_dist.telemetry.sinks import Sink, build_sink

logger = logging.getLogger(__name__)

SPEEDS = ("tokens_per_second", "label_tokens_per_second")
# Kept by a resume that has nothing to do.
KEPT = ("trained_parameters", "persistent_bytes", "law_bytes", "law")

# What summary.json says of the steps by their rows, see summary_of.
SUMMED = ("final_step", "final_loss", "tokens_seen", "label_tokens_seen", "eval_loss", "best_eval_loss")


class Recorder:
    """metrics.jsonl, layers.jsonl, summary.json, the logger and the progress bar. Does nothing but on rank 0.

    Times are in seconds, memory in GiB.
    """

    def __init__(
        self,
        config: Config,
        max_steps: int,
        *,
        num_blocks: int,
        started: float,
        first_step: int = 0,
        resumed_from: list[int] | None = None,
        evaluated_since: int = -1,
        doing: Doing | None = None,
    ) -> None:
        """Open the files of ``run.dir``.

        Args:
            config: names them, and the logger.
            max_steps: of the whole run.
            num_blocks: of the model.
            started: when this process began with the run, by ``time.monotonic``.
            first_step: steps already done, where the run goes on.
            resumed_from: the checkpoint steps that the run went on from.
            evaluated_since: a step; held-out losses until then are of other rows than those after it.
            doing: tells what the run works on, for the progress.
        """
        self.run = RunDirectory.of(config)
        self.resumed_from = resumed_from or []
        self.evaluated_since = evaluated_since
        self.started = started
        self.num_blocks = num_blocks
        self.peak_memory_gib = 0.0  # until the step that is under way
        self.retries = 0  # of the GPU's allocator, until the last row
        self.speeds: dict[str, list[float]] = {key: [] for key in SPEEDS}  # a speed a row
        self.counted: dict[str, float] = {}  # what the steps since the last row add up to
        self.parts: dict[str, float] = {}  # the seconds of their parts
        self.writer = RowWriter(self.run)
        self.summary: dict[str, Any] = {"num_blocks": num_blocks}
        if first_step and is_main():
            known = known_summary(self.run)
            self.summary |= {key: known[key] for key in KEPT if key in known}
        self.sink: Sink | None = None
        self.cut_after(first_step or -1)  # at a fresh start the evaluation of step 0 is repeated too
        if first_step:
            others = {"evaluated_since": evaluated_since} if evaluated_since >= 0 else {}
            self.record_event(first_step, "resume", f"went on from step {first_step}", **others)
        self.sink = build_sink(config, self.run, first_step)
        self.display = ProgressDisplay(max_steps, first_step, doing)

    def cut_after(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``: what was recorded past it is dropped."""
        self.writer.cut_after(step)
        self.counted, self.parts = {}, {}
        if self.sink is not None:
            self.sink.cut_after(step)
        if is_main():
            rows = read_rows(self.run.metrics)
            self.summary = {key: value for key, value in self.summary.items() if key not in SUMMED} | summary_of(
                rows, self.evaluated_since
            )
            self.speeds = {key: [row[key] for row in rows if row.get(key) is not None] for key in SPEEDS}

    def record_event(self, step: int, event: str, text: str, **more: Any) -> None:
        """Something happened after ``step`` steps: a resume, a fault, a roll-back, or answers to sample prompts."""
        self.writer.append(self.run.events, {"step": step, "event": event, "text": text, **more})

    def record_period(
        self,
        period: int,
        step: int,
        active_layers: list[int],
        norms: dict[int, float],
        scores: list[float] | None,
        active_modules: list[str] | None = None,
    ) -> None:
        """A period began: ``step`` is the first that trains these blocks, and modules, where such are drawn.

        ``norms`` are those of the weights of the blocks that trained until then, or train from then on.
        """
        row: dict[str, Any] = {"period": period, "step": step, "active_layers": active_layers}
        row |= {} if active_modules is None else {"active_modules": active_modules}
        row |= {"num_blocks": self.num_blocks, "weight_norms": norms}
        self.writer.append(self.run.layers, row if scores is None else {**row, "scores": scores})

    def begin_step(self) -> None:
        """What is in memory from here on is that of the step."""
        if is_main():
            self.peak_memory_gib = max(self.peak_memory_gib, peak_memory_gib())
            reset_peak_memory()

    def count_step(self, part_seconds: Mapping[str, float] | None = None, **amounts: float | None) -> None:
        """An optimizer step was made: add it to what the next row holds.

        Args:
            part_seconds: what the host spent in each part of the step.
            amounts: ``tokens`` of its global batch, padding left out; ``label_tokens``, those of them that carry loss;
                ``step_seconds`` from the wait for the data to the optimizer's step; ``data_seconds``, the wait;
                ``switch_seconds``, where a period began; ``flops``, where they are known.
        """
        for name, amount in {"steps": 1, **amounts}.items():
            if amount is not None:
                self.counted[name] = self.counted.get(name, 0) + amount
        for part, spent in (part_seconds or {}).items():
            self.parts[part] = self.parts.get(part, 0.0) + spent
        peak = peak_memory_gib()
        self.counted["peak_memory_gib"] = max(self.counted.get("peak_memory_gib", 0.0), peak)
        self.peak_memory_gib = max(self.peak_memory_gib, peak)  # Linux' own count may fall by a few pages
        for name in ("tokens", "label_tokens"):
            self.summary[f"{name}_seen"] = self.summary.get(f"{name}_seen", 0) + amounts[name]

    def record_step(self, *, peak_flops: float | None = None, **last: Any) -> None:
        """Write the row of the last step that was counted; the others since the row before have none.

        Seconds are those of a step in the mean over all these steps.

        Args:
            peak_flops: what all ranks together could do in a second; None: not known.
            last: ``step``, ``epoch``, ``period``, ``active_layers``, ``loss``, ``lr`` and ``grad_norm`` of the step.
        """
        counted, self.counted = self.counted, {}
        parts, self.parts = self.parts, {}
        seconds, steps = counted["step_seconds"], counted["steps"]
        row = {
            **last,
            "tokens": counted["tokens"],
            "label_tokens": counted["label_tokens"],
            "tokens_per_second": counted["tokens"] / seconds,
            "label_tokens_per_second": counted["label_tokens"] / seconds,
            "step_seconds": seconds / steps,
            "data_seconds": counted["data_seconds"] / steps,
            "peak_memory_gib": counted["peak_memory_gib"],
        }
        if parts:
            row["part_seconds"] = {part: total / steps for part, total in parts.items()}
        if "switch_seconds" in counted:
            row["switch_seconds"] = counted["switch_seconds"]
        row |= self._new_retries()
        if "flops" in counted and peak_flops is not None:
            row["mfu"] = counted["flops"] / seconds / peak_flops
        self._write(row)
        for key in SPEEDS:
            self.speeds[key].append(row[key])
        self.summary |= {"final_step": row["step"], "final_loss": row["loss"]}

    def _new_retries(self) -> dict[str, int]:
        """Return how often the allocator of rank 0's GPU had to try again since the last row; say the first time."""
        retries = allocator_retries()
        if retries is None:
            return {}
        if retries > 0 and self.retries == 0:
            logger.warning(
                "the GPU's memory is full: its allocator had to give back what it kept and to ask anew (%d times so "
                "far), which makes steps slow; parallel.activation_checkpointing=auto or a smaller "
                "train.micro_batch_size needs less",
                retries,
            )
        new, self.retries = retries - self.retries, retries
        self.summary["allocator_retries"] = retries
        return {"allocator_retries": new}

    def record_evaluation(self, step: int, eval_loss: float) -> None:
        """The validation set was run through the model."""
        self._write({"step": step, "eval_loss": eval_loss})
        self.summary["eval_loss"] = eval_loss
        if math.isfinite(eval_loss):
            self.summary["best_eval_loss"] = min(eval_loss, self.summary.get("best_eval_loss", eval_loss))

    def write_summary(self, exit_reason: str) -> None:
        """The run ended: ``finished``, ``signal``, or ``failed: <why>``.

        Speeds are medians of the steps, also of those before a resume; wall time is that of this process, loading,
        switches, evaluations and checkpoints included.
        """
        summary = {
            **self.summary,
            "wall_seconds": time.monotonic() - self.started,
            "peak_memory_gib": max(self.peak_memory_gib, peak_memory_gib()),
            **{key: statistics.median(values) for key, values in self.speeds.items() if values},
        }
        write_summary(self.run, exit_reason=exit_reason, resumed_from=self.resumed_from, **summary)

    def _write(self, row: MetricsRow) -> None:
        self.writer.append(self.run.metrics, row)
        if self.sink is not None:
            self.sink.log(row)
        self.display.update(row)

    def __enter__(self) -> Recorder:
        self.display.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.display.__exit__(*failure)
        if self.sink is not None:
            self.sink.close()
        self.writer.close()


def summary_of(rows: list[MetricsRow], evaluated_since: int = -1) -> dict[str, Any]:
    """Return what summary.json says of the steps before a resume, by their rows of metrics.jsonl.

    Only held-out losses after ``evaluated_since`` steps are compared: those before are of other rows.
    """
    summary: dict[str, Any] = {}
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    compared = [row["eval_loss"] for row in evaluations if row["step"] > evaluated_since]
    if steps:
        summary |= {"final_step": steps[-1]["step"], "final_loss": steps[-1]["loss"]}
        summary["tokens_seen"] = sum(row["tokens"] for row in steps)
        summary["label_tokens_seen"] = sum(row["label_tokens"] for row in steps)
    if evaluations:
        summary["eval_loss"] = evaluations[-1]["eval_loss"]
    if compared:
        summary["best_eval_loss"] = min(compared)
    return summary
