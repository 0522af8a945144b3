"""Python's logging, rank by rank: rank 0 speaks to the terminal, every rank to its own file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import rank
from lisa_dist.runtime.redaction import RedactingFormatter

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FOREIGN = ("transformers", "datasets", "huggingface_hub", "peft", "wandb", "torch", "lm_eval")


class TerminalHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the time, so that a progress bar can step aside for the line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # as every handler of the standard library does
            self.handleError(record)


class FileHandler(logging.FileHandler):
    """Writes to a file; a disk that refuses is told by what writes the record, and not after each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def setup_logging(run_dir: str | Path | None = None) -> None:
    """Send this process' log to the terminal on rank 0, and on every rank to ``logs/rank_N.log``.

    No file is opened where the launcher already redirects this rank's stderr to it, or without ``run_dir``.
    Warnings go the same way as the log, so four ranks do not warn four times on one terminal. To be called
    after the process group exists, for the rank, and again once the run directory is known.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    file = None if run_dir is None else RunDirectory(Path(run_dir)).rank_log(rank())
    redirected = file is not None and _stderr_is(file)
    if rank() == 0 or redirected:
        terminal = TerminalHandler()
        terminal.setFormatter(RedactingFormatter(FORMAT if redirected else "%(message)s"))
        root.addHandler(terminal)
    if file is not None and not redirected:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = FileHandler(file, encoding="utf-8")
        to_file.setFormatter(RedactingFormatter(FORMAT))
        root.addHandler(to_file)
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    logging.captureWarnings(True)
    warnings.filterwarnings("default", category=UserWarning)
    _take_over_libraries()


def _take_over_libraries() -> None:
    """Let libraries log through our handlers only, and only warnings; some install a handler of their own."""
    for name in FOREIGN:
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
        library.setLevel(logging.WARNING)
    if rank() != 0:
        # Read when the libraries are first imported, or at each bar: their progress bars are for rank 0.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


def _stderr_is(file: Path) -> bool:
    """Whether this process' stderr is ``file``."""
    try:
        return file.exists() and os.path.samestat(os.fstat(sys.stderr.fileno()), file.stat())
    except (OSError, ValueError, AttributeError):  # a stderr that is no file, as under pytest
        return False
