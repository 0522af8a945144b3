"""A run's own record read back, and what state the run is in by it. Needs no torch, so nobody waits for its import."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_dist.config.run_directory import RunDirectory

MetricsRow = dict[str, Any]

LOST_AFTER = 60.0  # seconds without a sign of life, which is written every two, until a run counts as gone
SETTLED = 5.0  # seconds in which the last sign of life may come after the summary of the same start
START_MAY_TAKE = 1800.0  # seconds from config.yaml to the first sign of life: weights and data are read first

# What every row of a file has, by the file's name.
NEEDED = {
    "metrics.jsonl": ("step",),
    "layers.jsonl": ("step", "active_layers"),
    "events.jsonl": ("step", "event", "text"),
}


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)  # null: it was not finite


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_answer(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key)) for key in ("prompt", "answer", "expected"))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_amount(value: Any) -> bool:
    return _is_number(value) or _are_numbers(value)  # whole, or by part


def _are_rows(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _are_numbers(found) if name == "left_out" else _is_number(found) for name, found in value.items()
    )


# What the values of a record are that its readers count with, by key.
KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "final_step", "max_steps", "evaluated_since", "num_blocks"), _is_number),
    **dict.fromkeys(("loss", "eval_loss", "lr", "grad_norm", "mfu", "tokens", "label_tokens"), _is_number),
    **dict.fromkeys(("tokens_per_second", "label_tokens_per_second", "peak_memory_gib"), _is_number),
    **dict.fromkeys(("step_seconds", "data_seconds", "wall_seconds"), _is_number),
    **dict.fromkeys(("event", "text"), _is_text),
    **dict.fromkeys(("law_bytes", "peak_bytes"), _is_number),
    **dict.fromkeys(("persistent_bytes", "trained_parameters"), _is_amount),
    **dict.fromkeys(("rows", "validation_rows"), _are_rows),
    "resumed_from": lambda value: isinstance(value, list) and all(isinstance(step, int) for step in value),
    "part_seconds": _are_numbers,
    "weight_norms": lambda value: _are_numbers(value) and all(block.isdigit() for block in value),
    "active_layers": lambda value: isinstance(value, list) and all(isinstance(block, int) for block in value),
    "active_modules": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "answers": lambda value: isinstance(value, list) and all(map(_is_answer, value)),
}


def check_record(found: Any, needed: tuple[str, ...] = ()) -> MetricsRow:
    """Return what a file of the record holds; ValueError where it is none of what a run writes there."""
    if not isinstance(found, dict):
        raise ValueError("not an object")
    for key in needed:
        if found.get(key) is None:
            raise ValueError(f"has no {key}")
    for key, is_right in KINDS.items():
        if key in found and not is_right(found[key]):
            raise ValueError(f"{key}={str(found[key])[:40]} is nothing that a run writes")
    return found


def read_rows(path: str | Path) -> list[MetricsRow]:
    """Return the rows of a JSON-lines file, [] where there is none; a torn last line is left out.

    Raises:
        ValueError: a line is not the object that a run writes there, see ``NEEDED`` and ``KINDS``.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        try:
            rows.append(check_record(row, NEEDED.get(path.name, ())))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def last_row(path: Path, key: str) -> MetricsRow:
    """Return the last whole row of a JSON-lines file that has ``key``, {} where none has; the rest is not parsed.

    Raises:
        ValueError: that row is not the object that a run writes there.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1  # what follows is being written
        found = content.rfind(f'"{key}":'.encode(), 0, end)
        if found < 0:
            return {}
        return check_record(json.loads(content[content.rfind(b"\n", 0, found) + 1 : content.find(b"\n", found)]))


@dataclass(frozen=True)
class Course:
    """How a loss went: its first, last and best value."""

    first: float
    last: float
    best: float
    best_step: int

    @property
    def change(self) -> str:
        """From the first to the last value, as a difference and in per cent."""
        share = f" ({self.last / self.first - 1:+.0%})" if self.first else ""
        return f"{self.last - self.first:+.4f}{share}"

    def __str__(self) -> str:
        if self.first == self.last == self.best:
            return f"{self.last:.4f}"
        return f"{self.last:.4f}, {self.change} from {self.first:.4f}; best {self.best:.4f} at step {self.best_step}"


def course_of(rows: list[MetricsRow], key: str) -> Course | None:
    """Return how the loss ``key`` went over the rows of metrics.jsonl, None where none has it."""
    known = [(row[key], row["step"]) for row in rows if row.get(key) is not None]
    if not known:
        return None
    return Course(known[0][0], known[-1][0], *min(known))


def comparable(rows: list[MetricsRow], events: list[MetricsRow]) -> list[MetricsRow]:
    """Return rows of metrics.jsonl less the held-out losses of other rows than the last, by those of events.jsonl."""
    resumes = [event for event in events if event["event"] == "resume"]
    since = resumes[-1].get("evaluated_since", -1) if resumes else -1
    return [row for row in rows if "eval_loss" not in row or row["step"] > since]


def read_summary(run: RunDirectory) -> MetricsRow | None:
    """Return summary.json as a dict, or None where there is none.

    Raises:
        ValueError: it is not the JSON object that a run writes.
    """
    if not run.summary.exists():
        return None
    try:
        return check_record(json.loads(run.summary.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{run.summary}: {error}") from None


def max_steps_of(run: RunDirectory) -> int | None:
    """Return the optimizer steps of the whole run, as rank 0 last noted them; None where it has not."""
    try:
        return check_record(json.loads(run.heartbeat(0).read_text())).get("max_steps")
    except (OSError, ValueError):  # not there, or just being written
        return None


@dataclass(frozen=True)
class RunState:
    """Whether a run goes on, and how it ended where it does not."""

    name: str  # starting, running, finished, stopped or failed
    reason: str  # why it failed, in a sentence; else empty
    seen: float  # the last sign of it, in seconds since the epoch
    summary: MetricsRow | None  # of the last start, where it has ended and left one


def state_of(run: RunDirectory) -> RunState:
    """Return the state of a run: by its summary, or by its sign of life where that is newer.

    Raises:
        ValueError: summary.json is not the JSON object that a run writes.
    """
    ended, alive, recorded, configured = map(last_change, (run.summary, run.heartbeat(0), run.metrics, run.config))
    seen = max(ended, alive, recorded, configured)
    summary = read_summary(run)
    # A run that goes on leaves the summary of its earlier start as it is until it ends.
    if summary is not None and alive <= ended + SETTLED:
        reason = str(summary.get("exit_reason", "unknown"))
        if reason in ("finished", "signal"):
            return RunState("finished" if reason == "finished" else "stopped", "", seen, summary)
        return RunState("failed", reason.removeprefix("failed: "), seen, summary)
    if time.time() - alive < LOST_AFTER:
        return RunState("running", "", seen, None)
    if not alive and not recorded and time.time() - configured < START_MAY_TAKE:
        return RunState("starting", "", seen, None)
    return RunState("failed", "it ended without being able to say why", seen, None)


def last_change(path: Path) -> float:
    """Return when a file was last written, in seconds since the epoch; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
