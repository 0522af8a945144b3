"""Where a run is: settled once, before the ranks start, so that all of them agree."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from lisa_dist.config import Config
from lisa_dist.config.errors import UserError
from lisa_dist.config.paths import local_path


def resolve_run_dir(config: Config) -> Config:
    """Return the configuration with ``run.dir`` settled as an absolute path; nothing is created.

    The default is ``runs/<run.name or date and time>`` in the current directory.
    """
    name = config.run.name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    directory = local_path(config.run.dir or str(Path("runs") / name)).resolve()
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)))


def check_run_dir_is_free(config: Config) -> None:
    """Raise :class:`UserError` where training would write over a run that it does not continue."""
    directory = Path(config.run.dir or "")
    if config.checkpoint.resume == "none" and holds_run(directory):
        raise UserError(
            f"run.dir={config.run.dir}: holds a run already, choose another directory or continue that run with "
            "checkpoint.resume=auto"
        )
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={config.run.dir}: must be a directory, but is a file")


def holds_run(directory: Path) -> bool:
    """Whether a step was recorded or saved here; a start that failed before its first step may be repeated."""
    metrics, checkpoints = directory / "metrics.jsonl", directory / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))
