"""What a rank prints goes to ``logs/rank_N.log``, and from rank 0 to the terminal too."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import TextIO

ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")


def set_up_logging(*, verbose: bool) -> None:
    """Print this package's log records (``verbose``: from INFO on, else from WARNING on) on the current stderr."""
    logging.basicConfig(handlers=[_CurrentStderr()], force=True)
    logging.getLogger("lisa_dist").setLevel(logging.INFO if verbose else logging.WARNING)


def write_rank_log(log_dir: Path, rank: int) -> TextIO:
    """Append this process' output to ``log_dir/rank_N.log`` and return that file.

    Rank 0 keeps its terminal, progress bar included, and gets a copy of its lines in the file. Of the other
    ranks everything goes to the file, also what native code prints.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    file = (log_dir / f"rank_{rank}.log").open("a", encoding="utf-8", buffering=1)
    if rank == 0:
        sys.stdout = _CopyToLog(sys.stdout, file)
        sys.stderr = _CopyToLog(sys.stderr, file)
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return file


class _CurrentStderr(logging.Handler):
    """Writes to whatever ``sys.stderr`` is when a record comes: a live progress bar replaces it for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _CopyToLog(io.TextIOBase):
    """A terminal whose finished lines are also written to a log file, without colours and without redraws."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal = terminal
        self.log = log
        self.unfinished = ""

    def write(self, text: str) -> int:
        self.terminal.write(text)
        *lines, self.unfinished = (self.unfinished + ESCAPE_SEQUENCE.sub("", text)).replace("\r\n", "\n").split("\n")
        for line in lines:
            self.log.write(_last_drawn(line) + "\n")
        self.unfinished = _last_drawn(self.unfinished)
        return len(text)

    def flush(self) -> None:
        self.terminal.flush()

    def isatty(self) -> bool:
        return self.terminal.isatty()

    def fileno(self) -> int:
        return self.terminal.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.terminal.encoding


def _last_drawn(line: str) -> str:
    """Return what a carriage return left on the line: a progress bar draws itself over and over."""
    before, _, after = line.rpartition("\r")
    return after or before.rpartition("\r")[2]
