"""Which jobs a sweep has: their overrides, their run directories, and the file that lists them."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.overrides import write_override
from lisa_dist.config.paths import followed, path_exists
from lisa_dist.config.run_directory import name_by_time
from lisa_dist.config.sweeps import Interval, Space, combinations, each_combination, read_space, varies
from lisa_dist.launching.sweeps.comparison import CSV_FILE, JOBS_FILE, PAGE_FILE, RESUME, JobRecord, write_comparison
from lisa_dist.runtime.files import make_folder, write_atomically
from lisa_dist.telemetry.run_lock import try_lock

OF_THE_SWEEP = ("sweep.", "launch.")  # keys that are not a job's
LOCK_FILE = ".lock"  # held by the process that runs the jobs
TRIED = 1000  # jobs of which one must have a configuration; Optuna's may be millions
NAME_LENGTH = 80  # of a run directory


def read_sweep(overrides: list[str], config_dir: str | None) -> tuple[Space, Config]:
    """Return the values of every key, and a configuration of the sweep with ``sweep.dir`` settled.

    Raises:
        UserError: the overrides are wrong for every job, or not those of a sweep.
    """
    if any(text.startswith("run.dir=") for text in overrides):
        raise UserError("run.dir: every job of a sweep has a run directory of its own, set sweep.dir instead")
    space = read_space(overrides, config_dir)
    for key, values in space.items():
        if key.startswith(OF_THE_SWEEP) and varies(values):
            raise UserError(f"{key}: is the sweep's own key and no job's, so it has one value; give it once")
    config = _first_valid(itertools.islice(each_combination(space), TRIED), config_dir)
    intervals = [values.key for values in space.values() if isinstance(values, Interval)]
    if intervals and not config.sweep.trials:
        raise UserError(
            f"{intervals[0]}: an interval has no list of values, write A,B or set sweep.trials=N to let Optuna choose"
        )
    directory = followed(config.sweep.dir or str(Path("sweeps") / name_by_time()))
    if "checkpoint.resume" in space and config.checkpoint.resume == "none" and path_exists(directory / JOBS_FILE):
        raise UserError(
            f"checkpoint.resume=none: the jobs in sweep.dir={directory} go on from their newest checkpoints; leave it "
            "out, or choose another directory to begin anew"
        )
    theirs = next((name for name in (CSV_FILE, PAGE_FILE) if path_exists(directory / name)), None)
    if theirs is not None and not (directory / JOBS_FILE).exists():
        raise UserError(
            f"sweep.dir={directory}: holds {theirs}, which no sweep wrote and this one would replace; choose another "
            "directory, or move that"
        )
    return space, replace(config, sweep=replace(config.sweep, dir=str(directory)))


def hold_sweep(directory: Path) -> TextIO:
    """Return the sweep's lock, which this process holds until the file is closed.

    Raises:
        UserError: another process has it, whose jobs and values would be mixed with those of this one.
    """
    file = (directory / LOCK_FILE).open("a")
    if try_lock(file) is False:
        file.close()
        raise UserError(f"sweep.dir={directory}: another process runs this sweep; stop it first, or wait for its end")
    return file


def list_jobs(space: Space, directory: Path) -> list[JobRecord]:
    """Write the file of jobs, one for every combination of the values, or find it written already.

    Raises:
        UserError: ``directory`` holds another sweep, or can't be written.
    """
    text = jobs_text(space, combinations(space), directory)
    path = directory / JOBS_FILE
    if path.is_file() and path.read_text() != text:
        raise UserError(f"sweep.dir={directory}: holds a sweep over other values, choose another directory")
    make_folder(directory, f"sweep.dir={directory}")
    write_atomically(path, text)
    return write_comparison(directory)


def unfinished(jobs: list[JobRecord]) -> list[JobRecord]:
    """Return the jobs that are still to be run or to go on."""
    return [job for job in jobs if job.state != "finished"]


def jobs_text(space: Space, jobs: list[list[str]], directory: Path) -> str:
    """Return the content of the file of jobs: a line a job, its folder and its overrides, quoted for the shell.

    A folder is named by what differs between the jobs, of ``space``, each of which has an override of every key.

    Raises:
        UserError: an override does not fit on a line.
    """
    lines = []
    for number, job in enumerate(jobs):
        pairs = [text.partition("=") for text, values in zip(job, space.values()) if varies(values)]
        settings = ",".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
        name = re.sub(r"[^\w.=+-]+", "_", f"{number}_{settings or 'job'}")[:NAME_LENGTH]
        own = [text for text in job if not text.startswith(OF_THE_SWEEP)]
        for text in own:
            if len(text.splitlines()) > 1:
                raise UserError(f"{text!r}: must be one line in a sweep, whose {JOBS_FILE} has a line a job")
        lines.append(shlex.join([name, *own, RESUME, write_override("run.dir", str(directory / name))]) + "\n")
    return "".join(lines)


def _first_valid(jobs: Iterable[list[str]], config_dir: str | None) -> Config:
    """Return the configuration of the first job that has one; a mistake in some jobs is theirs, not the sweep's."""
    first_mistake: UserError | None = None
    for job in jobs:
        try:
            return load(job, config_dir)
        except UserError as mistake:
            first_mistake = first_mistake or mistake
    assert first_mistake is not None
    raise first_mistake
