"""``lisa-dist train --multirun``: trains once for every combination of values, each job in a process of its own.

A job that fails does not end the sweep. Run again with the same ``sweep.dir``, a sweep leaves finished jobs alone
and goes on with the others from their newest checkpoints.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from lisa_dist.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Config
from lisa_dist.config.overrides import write_override
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.sweeps import Space
from lisa_dist.launching.sweeps.comparison import (
    EXIT_CODE_FILE,
    LOG_FILE,
    RESUME,
    JobRecord,
    last_words,
    write_comparison,
)
from lisa_dist.launching.sweeps.jobs import hold_sweep, list_jobs, unfinished
from lisa_dist.launching.sweeps.optuna_search import OptunaSearch
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.signals import STOP_SIGNALS, die_with
from lisa_dist.runtime.units import format_duration
from lisa_dist.telemetry.records import record_failure, summary_is_new

POLL_SECONDS = 0.1


@dataclass
class RunningJob:
    """A job's process, and its place among those that run side by side."""

    record: JobRecord
    process: subprocess.Popen[bytes]
    place: int
    started: float  # seconds since the epoch


def run_sweep(space: Space, config: Config, config_dir: str | None) -> int:
    """Run every job that has not finished, ``sweep.parallel`` side by side, and compare them all.

    A first stop signal lets the running jobs save and stop, a second kills them.

    Args:
        space, config: as :func:`~lisa_dist.launching.sweeps.jobs.read_sweep` returns them.
        config_dir: further folder of presets.

    Returns:
        0 where every job has finished, 75 where a signal stopped the sweep and no job failed, else 1.

    Raises:
        UserError: ``sweep.dir`` holds another sweep, another process runs it, or Optuna is missing.
    """
    sweep_dir = Path(str(config.sweep.dir))
    if config.sweep.trials:
        search = OptunaSearch(space, sweep_dir)
        lock = hold_sweep(sweep_dir)
        jobs, waiting, total = search.record(), search.jobs(config.sweep.trials), config.sweep.trials
    else:
        jobs = list_jobs(space, sweep_dir)
        lock = hold_sweep(sweep_dir)
        waiting, total = iter(unfinished(jobs)), len(jobs)
    finished = len(jobs) - len(unfinished(jobs))
    print(f"lisa-dist: {total} jobs, {finished} of them finished, in {sweep_dir}", flush=True)
    with lock, _stop_signals() as received:
        _run_jobs(waiting, total, config, config_dir, received)
    jobs = search.record() if config.sweep.trials else write_comparison(sweep_dir)
    states = [job.state for job in jobs]
    print(f"lisa-dist: {', '.join(f'{states.count(s)} {s}' for s in sorted(set(states)))}; {sweep_dir}/index.html")
    if "failed" in states:
        return EXIT_FAILED
    return EXIT_STOPPED if "stopped" in states else EXIT_DONE


def _run_jobs(
    waiting: Iterator[JobRecord], total: int, config: Config, config_dir: str | None, received: list[int]
) -> None:
    running: list[RunningJob] = []
    gpus = _shares_of_gpus(config.sweep.parallel)
    asked = 0
    while True:
        while not received and len(running) < config.sweep.parallel and (record := next(waiting, None)) is not None:
            place = min(set(range(config.sweep.parallel)) - {job.place for job in running})
            running.append(_start(record, place, gpus[place], config_dir))
        if not running:
            return
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
    arguments = [*more, *record.overrides, RESUME, write_override("run.dir", str(run_dir))]
    with (run_dir / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lisa_dist", "train", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which decides what it means
            preexec_fn=functools.partial(die_with, os.getpid(), signal.SIGTERM),
        )
    return RunningJob(record, process, place, time.time())


def _finish(job: RunningJob, total: int, *, stopping: bool) -> None:
    """Note how a job ended, and say so."""
    run_dir, code = job.record.run_dir, job.process.returncode
    if stopping and code == -signal.SIGTERM:
        return  # asked to stop before it had begun: it counts as not run
    code = 128 - code if code < 0 else code  # as a shell reports a signal
    if code not in (EXIT_DONE, EXIT_STOPPED):
        run = RunDirectory(run_dir)
        if not summary_is_new(run, job.started):
            record_failure(run, last_words(run_dir))
    write_atomically(run_dir / EXIT_CODE_FILE, f"{code}\n")
    jobs = write_comparison(run_dir.parent)
    record = jobs[job.record.number]
    losses = [("loss", record.final_loss), ("validation", record.eval_loss)]
    told = record.reason or ", ".join(f"{name} {value:.4f}" for name, value in losses if value is not None)
    seconds = format_duration(time.time() - job.started)
    print(f"lisa-dist: job {record.number} of {total} {record.state} in {seconds}, {run_dir.name}: {told}", flush=True)


def _shares_of_gpus(places: int) -> list[str | None]:
    """Return for each place the GPUs that its jobs see; None: those that the sweep sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # CUDA stops at the first that is none, as in "0,1,"
    gpus = (visible.split(",") if visible else [str(index) for index in range(count)])[:count]
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
