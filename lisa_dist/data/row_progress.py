"""What a person sees while rows become tokens: a bar on a terminal, else a log line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def row_progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` rows (None: not known) of the data ``name`` are done, for as long as the body runs.

    Yields the function to call with the number of further ones.
    """
    if not sys.stdout.isatty():
        yield _log_lines(name, total)
        return
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stdout)
    with Progress(TextColumn("tokenizing"), *columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda rows: bar.advance(task, rows)


def _log_lines(name: str, total: int | None) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(rows: int) -> None:
        nonlocal last, done
        done += rows
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            of_all = "" if total is None else f" of {total}"
            logger.info("tokenized %d%s rows of %s, %.0f rows/s", done, of_all, name, done / (now - started))

    return advance
