"""What a person sees of a run on rank 0: a table of what is effective, then a bar, or plain lines in a file."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
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
WIDTH_IN_FILES = 110  # of tables, where there is no terminal
Doing = Callable[[], tuple[str, float]]  # what a run works on, and for how many seconds

SLOW = 1.0  # seconds of one part of the work, until the bar names it
SILENCE = 30.0  # seconds of one part, until a log without a bar names it
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
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table, above the bar where there is one: of a text that is printed the bar knows, of a console not."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_IN_FILES, highlight=False)
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="", flush=True)


class ProgressDisplay:
    """Shows the steps of a run: a bar on a terminal, else a log line every ten seconds; nothing on other ranks.

    Where one part of the work takes long, it is named: in the bar in place of the time to go, else in a line.
    """

    def __init__(self, max_steps: int, first_step: int = 0, doing: Doing | None = None) -> None:
        """Args:
        max_steps: of the whole run.
        first_step: steps already done, where the run goes on.
        doing: tells what the run works on; any thread may ask.
        """
        self.max_steps = max_steps
        self.step = first_step
        self.doing = doing
        self.row: dict[str, Any] = {}  # of the last step
        self.time_to_go = ""
        self.stopped = threading.Event()
        self.watcher = threading.Thread(target=self._watch, name="progress", daemon=True)
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.eval_loss: float | None = None
        self.last_line = -float("inf")
        self.shown = is_main()
        self.live: Live | None = None
        if self.shown and sys.stdout.isatty():
            self.line = Text(no_wrap=True, overflow="ellipsis")  # one line, however narrow the terminal
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[to_go]}"),
                expand=True,
            )
            self.task = self.bar.add_task("", total=max_steps, completed=first_step, to_go="")
            self.live = Live(
                get_renderable=self._render,
                console=Console(file=sys.stdout),
                redirect_stderr=sys.stderr.isatty(),  # what goes to a file must not step aside for the bar
            )

    def __enter__(self) -> ProgressDisplay:
        if self.live is not None:
            self.live.start()
        elif self.shown and self.doing is not None:
            self.watcher.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stopped.set()
        if self.watcher.is_alive():
            self.watcher.join()
        self.doing, self.time_to_go = None, ""  # the bar that stays says where the run ended
        if self.live is not None:
            self.live.stop()

    def update(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl, of a step or of a validation."""
        if not self.shown:
            return
        if "eval_loss" in row:
            self.eval_loss = row["eval_loss"]
            if self.live is not None:
                self.line.plain = self.line_of(self.row) if self.row else f"eval {self.eval_loss:.4f}"
            else:
                logger.info("step %d/%d  eval loss %.4f", row["step"], self.max_steps, row["eval_loss"])
            return
        self.recent.append(row["step_seconds"])
        self.row, self.step = row, row["step"]
        line, to_go = self.line_of(row), self.to_go(row)
        if self.live is not None:
            self.bar.update(self.task, completed=row["step"])
            self.line.plain, self.time_to_go = line, to_go
            return
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or row["step"] == self.max_steps:
            self.last_line = now
            logger.info("step %d/%d  %s  %s", row["step"], self.max_steps, line, to_go)

    def tell_of_part(self, longer_than: float = SILENCE) -> float:
        """Log what the run works on where that takes ``longer_than`` seconds; return when to tell of it again."""
        assert self.doing is not None
        part, seconds = self.doing()
        if seconds < SILENCE:
            return SILENCE
        if seconds < longer_than:
            return longer_than
        logger.info("step %d/%d  %s, for %s", self.step, self.max_steps, part, format_duration(seconds))
        return 2 * seconds

    def _watch(self) -> None:
        longer_than = SILENCE
        while not self.stopped.wait(SLOW):
            longer_than = self.tell_of_part(longer_than)

    def _render(self) -> Group:
        """Return the bar and the line of the last step. Called by the thread that draws them."""
        part, seconds = ("", 0.0) if self.doing is None else self.doing()
        shown = f"{part}, {format_duration(seconds)}" if seconds >= SLOW else self.time_to_go
        self.bar.update(self.task, to_go=shown)
        return Group(self.bar, self.line)

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
