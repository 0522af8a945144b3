"""``lisa-dist runs FOLDER``: the run directories below a folder, and how each one stands."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.units import format_count, format_duration
from lisa_dist.telemetry.history import last_change, last_row, max_steps_of, state_of

COLORS = {"running": "green", "starting": "green", "finished": "", "stopped": "yellow", "failed": "red", "unknown": ""}


@dataclass(frozen=True)
class RunLine:
    """How one run stands, for a line of the table; None: the record does not say."""

    run: str  # its directory
    state: str  # starting, running, finished, stopped, failed or unknown
    reason: str  # why it failed, or is not known
    step: int | None  # the last one recorded
    max_steps: int | None  # of the whole run
    loss: float | None  # of that step
    eval_loss: float | None  # of the last evaluation
    tokens_per_second: float | None  # of that step
    seconds_since_sign: float  # since something of the run was last written


def run(config: Config) -> int:
    """Print the runs below ``runs.dir``, the one last heard of first.

    Raises:
        UserError: the folder does not exist.
    """
    folder = local_path(config.runs.dir)
    if not folder.is_dir():
        raise UserError(f"runs.dir={folder}: must be a folder that exists; name another, as in lisa-dist runs FOLDER")
    lines = sorted((line_of(path) for path in find_runs(folder)), key=lambda line: line.seconds_since_sign)
    if config.runs.format == "json":
        print(json.dumps([asdict(line) for line in lines], indent=2))
    elif not lines:
        print(f"no run below {folder}")
    else:
        _print_table(folder, lines)
    return EXIT_DONE


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run directories at and below ``folder``; links to folders are not followed, closed ones are named."""
    for path, folders, files in os.walk(folder, onerror=_tell_closed):
        recorded = {"metrics.jsonl", "summary.json"} & {*files}
        if recorded or ("config.yaml" in files and "checkpoints" in folders):
            folders.clear()  # what lies in a run is no run
            yield Path(path)


def _tell_closed(error: OSError) -> None:
    print(f"lisa-dist: {error.filename}: {error.strerror}, what is in it is left out", file=sys.stderr)


def line_of(path: Path) -> RunLine:
    """Return how the run in ``path`` stands."""
    run = RunDirectory(path)
    try:
        state = state_of(run)
        step, evaluation = last_row(run.metrics, "loss"), last_row(run.metrics, "eval_loss")
    except (ValueError, OSError) as error:
        changed = max(last_change(run.metrics), last_change(run.summary))
        closed = isinstance(error, PermissionError)
        name, reason = ("unknown", "its record may not be read") if closed else ("failed", "its record is damaged")
        return RunLine(str(path), name, reason, None, None, None, None, None, max(0.0, time.time() - changed))
    return RunLine(
        run=str(path),
        state=state.name,
        reason=state.reason,
        step=step.get("step"),
        max_steps=max_steps_of(run),
        loss=step.get("loss"),
        eval_loss=evaluation.get("eval_loss"),
        tokens_per_second=step.get("tokens_per_second"),
        seconds_since_sign=max(0.0, time.time() - state.seen),
    )


def _print_table(folder: Path, lines: list[RunLine]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "step", "loss", "eval loss", "tokens/s", "last sign"):
        table.add_column(name, overflow="fold", justify="left" if name in ("run", "state") else "right")
    for line in lines:
        step = "" if line.step is None else str(line.step)
        table.add_row(
            Text(os.path.relpath(line.run, folder)),  # as a plain text, a name with [brackets] would be markup
            Text(line.state + (f": {line.reason}" if line.reason else ""), style=COLORS[line.state]),
            step + (f"/{line.max_steps}" if line.max_steps else ""),
            "" if line.loss is None else f"{line.loss:.4f}",
            "" if line.eval_loss is None else f"{line.eval_loss:.4f}",
            "" if line.tokens_per_second is None else format_count(line.tokens_per_second),
            f"{format_duration(line.seconds_since_sign)} ago",
        )
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 140
    console.print(table)
