"""``lisa-dist train --multirun``: trains once for every combination of values, each job in a process of its own.

A job that fails does not end the sweep. Run again with the same ``sweep.dir``, a sweep leaves finished jobs alone
and goes on with the others from their newest checkpoints.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch

from lisa_dist.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.overrides import path_override
from lisa_dist.config.sweeps import SweptOverrides, split_sweep
from lisa_dist.launching.local import PR_SET_PDEATHSIG
from lisa_dist.signals import STOP_SIGNALS
from lisa_dist.telemetry.comparison import (
    EXIT_CODE_FILE,
    JOBS_FILE,
    LOG_FILE,
    RESUME,
    JobRecord,
    last_words,
    write_comparison,
)
from lisa_dist.telemetry.records import SUMMARY_FILE, read_summary, write_atomically, write_summary
from lisa_dist.telemetry.units import format_duration

OF_THE_SWEEP = ("sweep.", "launch.")  # keys that are not a job's
POLL_SECONDS = 0.1
NAME_LENGTH = 80  # of a run directory


@dataclass
class RunningJob:
    """A job's process, and its place among those that run side by side."""

    record: JobRecord
    process: subprocess.Popen[bytes]
    place: int
    started: float  # seconds since the epoch


def run_sweep(overrides: list[str], config_dir: str | None) -> int:
    """Run every job that has not finished, ``sweep.parallel`` side by side, and compare them all.

    A first stop signal lets the running jobs save and stop, a second kills them.

    Returns:
        0 where every job has finished, 75 where a signal stopped the sweep and no job failed, else 1.

    Raises:
        UserError: the overrides are wrong for every job, or ``sweep.dir`` holds another sweep.
    """
    jobs, config = open_sweep(overrides, config_dir)
    sweep_dir = Path(str(config.sweep.dir))
    waiting = unfinished(jobs)
    print(f"lisa-dist: {len(jobs)} jobs, {len(jobs) - len(waiting)} of them finished, in {sweep_dir}", flush=True)
    with _stop_signals() as received:
        _run_jobs(waiting, len(jobs), config, config_dir, received)
    jobs = write_comparison(sweep_dir)
    states = [job.state for job in jobs]
    print(f"lisa-dist: {', '.join(f'{states.count(s)} {s}' for s in sorted(set(states)))}; {sweep_dir}/index.html")
    if "failed" in states:
        return EXIT_FAILED
    return EXIT_STOPPED if "stopped" in states else EXIT_DONE


def open_sweep(overrides: list[str], config_dir: str | None) -> tuple[list[JobRecord], Config]:
    """Write the file of jobs, or find it written already, and return the jobs and a configuration of the sweep.

    Raises:
        UserError: the overrides are wrong for every job, or ``sweep.dir`` holds another sweep.
    """
    if any(text.startswith("run.dir=") for text in overrides):
        raise UserError("run.dir: every job of a sweep has a run directory of its own, set sweep.dir instead")
    swept = split_sweep(overrides, config_dir)
    config = _first_valid(swept, config_dir)
    directory = Path(config.sweep.dir or Path("sweeps") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    directory = directory.expanduser().resolve()
    lines = [_job_line(number, job, directory) for number, job in enumerate(swept)]
    text = "".join(f"{line}\n" for line in lines)
    path = directory / JOBS_FILE
    if path.is_file() and path.read_text() != text:
        raise UserError(f"sweep.dir={directory}: holds a sweep over other values, choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"sweep.dir={directory}: can't be written, {error.strerror}") from None
    jobs = write_comparison(directory)
    return jobs, replace(config, sweep=replace(config.sweep, dir=str(directory)))


def unfinished(jobs: list[JobRecord]) -> list[JobRecord]:
    """Return the jobs that are still to be run or to go on."""
    return [job for job in jobs if job.state != "finished"]


def _first_valid(swept: list[SweptOverrides], config_dir: str | None) -> Config:
    """Return the configuration of the first job that has one; a mistake in some jobs is theirs, not the sweep's."""
    first_mistake: UserError | None = None
    for job in swept:
        try:
            return load(job.overrides, config_dir)
        except UserError as mistake:
            first_mistake = first_mistake or mistake
    assert first_mistake is not None
    raise first_mistake


def _job_line(number: int, job: SweptOverrides, directory: Path) -> str:
    pairs = [text.partition("=") for text in job.varied]
    settings = ",".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs)
    name = re.sub(r"[^\w.=+-]+", "_", f"{number}_{settings or 'job'}")[:NAME_LENGTH]
    own = [text for text in job.overrides if not text.startswith(OF_THE_SWEEP)]
    return shlex.join([name, *own, RESUME, path_override("run.dir", str(directory / name))])


def _run_jobs(
    waiting: list[JobRecord], total: int, config: Config, config_dir: str | None, received: list[int]
) -> None:
    running: list[RunningJob] = []
    gpus = _shares_of_gpus(config.sweep.parallel)
    asked = 0
    while running or (waiting and not received):
        while waiting and not received and len(running) < config.sweep.parallel:
            place = min(set(range(config.sweep.parallel)) - {job.place for job in running})
            running.append(_start(waiting.pop(0), place, gpus[place], config_dir))
        if len(received) > asked:
            asked = len(received)
            print(f"lisa-dist: {'the jobs save and stop; again kills them' if asked == 1 else 'the jobs are killed'}")
            for job in running:
                job.process.send_signal(signal.SIGTERM)  # a second one makes the job kill its ranks
        for job in [job for job in running if job.process.poll() is not None]:
            running.remove(job)
            _finish(job, total, stopping=bool(received))
        time.sleep(POLL_SECONDS)


def _start(record: JobRecord, place: int, gpus: str | None, config_dir: str | None) -> RunningJob:
    run_dir = record.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / EXIT_CODE_FILE).unlink(missing_ok=True)
    more = ["--config-dir", config_dir] if config_dir else []
    place_of_run = path_override("run.dir", str(run_dir))
    command = [sys.executable, "-m", "lisa_dist", "train", *more, *record.overrides, RESUME, place_of_run]
    environment = dict(os.environ) if gpus is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    sweep_process = os.getpid()

    def die_with_sweep() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != sweep_process:
            os._exit(EXIT_FAILED)

    with (run_dir / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which decides what it means
            preexec_fn=die_with_sweep,
        )
    return RunningJob(record, process, place, time.time())


def _finish(job: RunningJob, total: int, *, stopping: bool) -> None:
    """Note how a job ended, and say so."""
    run_dir, code = job.record.run_dir, job.process.returncode
    if stopping and code == -signal.SIGTERM:
        return  # asked to stop before it had begun: it counts as not run
    code = 128 - code if code < 0 else code  # as a shell reports a signal
    if code not in (EXIT_DONE, EXIT_STOPPED):
        summary = run_dir / SUMMARY_FILE
        if not (summary.exists() and summary.stat().st_mtime >= job.started):
            known = read_summary(run_dir) or {"resumed_from": []}
            write_summary(run_dir, **{**known, "exit_reason": f"failed: {last_words(run_dir)}"})
    write_atomically(run_dir / EXIT_CODE_FILE, f"{code}\n")
    jobs = write_comparison(run_dir.parent)
    record = jobs[job.record.number]
    figures = [("loss", record.final_loss), ("validation", record.eval_loss)]
    found = ", ".join(f"{name} {value:.4f}" for name, value in figures if value is not None)
    told = record.reason or found
    seconds = format_duration(time.time() - job.started)
    print(f"lisa-dist: job {record.number} of {total} {record.state} in {seconds}, {run_dir.name}: {told}", flush=True)


def _shares_of_gpus(places: int) -> list[str | None]:
    """Return for each place the GPUs that its jobs see; None: those that the sweep sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if places == 1 or len(gpus) < places:
        return [None] * places
    return [",".join(gpus[place::places]) for place in range(places)]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect stop signals in the list that is yielded."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    old = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
