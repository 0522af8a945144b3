"""What a person sees of a run on rank 0: a table of what is effective, then a bar, or plain lines in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lisa_dist.runtime.distributed import is_main
from lisa_dist.runtime.units import format_count, format_duration, format_ranges

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
RECENT_STEPS = 20  # whose mean duration tells the time to go


def announce(entries: dict[str, str], title: str = "") -> None:
    """Print what is effective in this run as a table of two columns, once, on rank 0."""
    if not is_main():
        return
    table = Table(title=title or None, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in entries.items():
        table.add_row(key, Text(value))  # as a plain text, a path with [brackets] would be taken for markup
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110, highlight=False).print(table)


class ProgressDisplay:
    """Shows the steps of a run: a bar on a terminal, else a log line every ten seconds; nothing on other ranks."""

    def __init__(self, max_steps: int, first_step: int = 0) -> None:
        self.max_steps = max_steps
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.eval_loss: float | None = None
        self.last_line = -float("inf")
        self.shown = is_main()
        self.live: Live | None = None
        if self.shown and sys.stdout.isatty():
            self.line = Text()
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[to_go]}"),
                expand=True,
            )
            self.task = self.bar.add_task("", total=max_steps, completed=first_step, to_go="")
            self.live = Live(Group(self.bar, self.line), console=Console(file=sys.stdout))

    def __enter__(self) -> ProgressDisplay:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl, of a step or of a validation."""
        if not self.shown:
            return
        if "eval_loss" in row:
            self.eval_loss = row["eval_loss"]
            if self.live is None:
                logger.info("step %d/%d  eval loss %.4f", row["step"], self.max_steps, row["eval_loss"])
            return
        self.recent.append(row["step_seconds"])
        line, to_go = self.line_of(row), self.to_go(row)
        if self.live is not None:
            self.bar.update(self.task, completed=row["step"], to_go=to_go)
            self.line.plain = line
            return
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or row["step"] == self.max_steps:
            self.last_line = now
            logger.info("step %d/%d  %s  %s", row["step"], self.max_steps, line, to_go)

    def to_go(self, row: dict[str, Any]) -> str:
        """Return the time to go, from the mean duration of the last steps."""
        return f"{format_duration((self.max_steps - row['step']) * sum(self.recent) / len(self.recent))} to go"

    def line_of(self, row: dict[str, Any]) -> str:
        """Return the loss, the speed and the blocks of a step in one line."""
        parts = [f"loss {row['loss']:.4f}"]
        if self.eval_loss is not None:
            parts.append(f"eval {self.eval_loss:.4f}")
        parts += [
            f"lr {row['lr']:.2e}",
            f"{format_count(row['tokens_per_second'])} tokens/s",
            f"{row['peak_memory_gib']:.2f} GiB",
            f"blocks {format_ranges(row['active_layers']) or 'none'}",
        ]
        return "  ".join(parts)
