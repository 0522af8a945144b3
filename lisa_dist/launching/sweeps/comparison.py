"""The jobs of a sweep compared: ``sweep.csv`` and ``index.html``, from what the jobs left in their run directories."""

from __future__ import annotations

import csv
import io
import math
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, UserError
from lisa_dist.config.paths import begins_with
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.units import format_count
from lisa_dist.telemetry.history import MetricsRow, read_rows, read_summary
from lisa_dist.telemetry.reports.charts import Series, line_chart, scatter_chart, smoothed
from lisa_dist.telemetry.reports.page import PAGE_START, Card, Link, chart, render_page, table
from lisa_dist.telemetry.reports.run_page import write_report

JOBS_FILE = "jobs.txt"  # a line a job, quoted for the shell: its folder, its overrides, RESUME and run.dir=
EXIT_CODE_FILE = "exit_code"  # in a job's run directory, once it has ended
LOG_FILE = "job.log"  # in a job's run directory: what the job printed
CSV_FILE = "sweep.csv"
PAGE_FILE = "index.html"
RESUME = "checkpoint.resume=auto"
NUMBERS = ("final_loss", "eval_loss", "peak_memory_gib", "tokens_per_second")
COLUMNS = ("job", "overrides", "run_dir", "state", "exit_code", "reason", *NUMBERS)


@dataclass
class JobRecord:
    """One job of a sweep and what is known of its run."""

    number: int
    overrides: list[str]
    run_dir: Path
    exit_code: int | None  # None: it has not ended
    summary: MetricsRow
    metrics: list[MetricsRow]

    def known(self, key: str) -> list[Any]:
        """Return the values of a key in the rows that have one."""
        return [row[key] for row in self.metrics if row.get(key) is not None]

    @property
    def state(self) -> str:
        """``finished``, ``failed``, or ``stopped``: by a signal, or never begun."""
        if self.exit_code in (None, EXIT_STOPPED):
            return "stopped"
        return "finished" if self.exit_code == EXIT_DONE else "failed"

    @property
    def reason(self) -> str:
        """Why the job did not finish, in a sentence; empty where it did."""
        if self.state == "finished":
            return ""
        if self.exit_code is None:
            return "not ended yet"
        if self.exit_code == EXIT_STOPPED:
            return "stopped on a signal, after a checkpoint"
        told = str(self.summary.get("exit_reason", ""))
        return told.removeprefix("failed: ") if told.startswith("failed") else last_words(self.run_dir)

    @property
    def needs_page(self) -> bool:
        """Whether the job has ended and left a record, and no page since; one of another program is kept."""
        page, ended = RunDirectory(self.run_dir).report, self.run_dir / EXIT_CODE_FILE
        is_new = page.is_file() and ended.is_file() and page.stat().st_mtime >= ended.stat().st_mtime
        has_record = self.exit_code is not None and bool(self.metrics or self.summary)
        return has_record and not is_new and begins_with(page, PAGE_START)

    @property
    def final_loss(self) -> float | None:
        """The training loss of the last step."""
        return next(reversed(self.known("loss")), None)

    @property
    def eval_loss(self) -> float | None:
        """The validation loss of the last evaluation, infinite where it was not finite, which the rows hold as null."""
        last = next((row for row in reversed(self.metrics) if "eval_loss" in row), None)
        if last is None:
            return None
        return math.inf if last["eval_loss"] is None else last["eval_loss"]

    @property
    def peak_memory_gib(self) -> float | None:
        """The peak memory of rank 0."""
        return self.summary.get("peak_memory_gib", max(self.known("peak_memory_gib"), default=None))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second, padding left out: the median of the steps."""
        known = self.known("tokens_per_second")
        return statistics.median(known) if known else None


def write_comparison(sweep_dir: Path) -> list[JobRecord]:
    """Write ``sweep.csv``, ``index.html`` and the page of each job that has ended, and return the jobs.

    Raises:
        UserError: no sweep is there, or a record of a job is damaged.
    """
    jobs = read_jobs(sweep_dir)
    for job in jobs:
        if job.needs_page:
            write_report(RunDirectory(job.run_dir))
    write_atomically(sweep_dir / CSV_FILE, _csv(jobs))
    write_atomically(sweep_dir / PAGE_FILE, _page(sweep_dir, jobs))
    return jobs


def read_jobs(sweep_dir: Path) -> list[JobRecord]:
    """Return the jobs of a sweep, in their order."""
    path = sweep_dir / JOBS_FILE
    if not path.is_file():
        raise UserError(f"sweep.dir={sweep_dir}: must be the directory of a sweep, which has a {JOBS_FILE}")
    return [_read_job(sweep_dir, number, line) for number, line in enumerate(path.read_text().splitlines())]


def _read_job(sweep_dir: Path, number: int, line: str) -> JobRecord:
    try:
        name, *overrides, resume, _ = shlex.split(line)
    except ValueError:
        resume = ""
    if resume != RESUME:
        raise UserError(f"sweep.dir={sweep_dir}: no sweep wrote line {number + 1} of its {JOBS_FILE}")
    run = RunDirectory(sweep_dir / name)
    code = run.path / EXIT_CODE_FILE
    try:
        exit_code = int(code.read_text()) if code.is_file() else None
        return JobRecord(number, overrides, run.path, exit_code, read_summary(run) or {}, read_rows(run.metrics))
    except (ValueError, OSError) as error:
        raise UserError(f"{run.path}: the record of this job is damaged: {error}") from None


def best_job(jobs: list[JobRecord]) -> JobRecord | None:
    """Return the finished job of the lowest validation loss; where not all have one, of the lowest training loss."""
    finished = [job for job in jobs if job.state == "finished"]
    for figure in ("eval_loss", "final_loss"):
        values = [getattr(job, figure) for job in finished]
        if finished and None not in values:
            return finished[values.index(min(values))] if min(values) < math.inf else None
    return None


def last_words(run_dir: Path) -> str:
    """Return the program's last message in the logs of a job that could not write a summary."""
    logs = [run_dir / LOG_FILE, *sorted(RunDirectory(run_dir).logs.glob("slurm-*.log"))]
    lines = [line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines()]
    said = [line.removeprefix("lisa-dist: ") for line in lines if line.startswith("lisa-dist: ")]
    return said[-1] if said else f"ended without a message, its logs are in {run_dir}"


def _csv(jobs: list[JobRecord]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # None becomes an empty cell
    writer.writerow(COLUMNS)
    for job in jobs:
        about = [job.number, " ".join(job.overrides), job.run_dir, job.state, job.exit_code, job.reason]
        writer.writerow([*about, *(getattr(job, name) for name in NUMBERS)])
    return text.getvalue()


def _page(sweep_dir: Path, jobs: list[JobRecord]) -> str:
    states = [job.state for job in jobs]
    best = best_job(jobs)
    shared = [text for text in jobs[0].overrides if all(text in job.overrides for job in jobs)] if jobs else []
    settings = [" ".join(text for text in job.overrides if text not in shared) for job in jobs]
    headlines = {"jobs": str(len(jobs))} | {state: str(states.count(state)) for state in sorted(set(states))}
    if best is not None:
        headlines["best job"] = str(best.number)
    rows: list[list[str | Link]] = [
        [
            _name(job, " ★ best" if job is best else ""),
            setting,
            job.state + (f": {job.reason}" if job.reason else ""),
            _written(job.final_loss, "{:.4f}".format),
            _written(job.eval_loss, "{:.4f}".format),
            _written(job.peak_memory_gib, "{:.3g}".format),
            _written(job.tokens_per_second, format_count),
        ]
        for job, setting in zip(jobs, settings)
    ]
    columns = ["job", "overrides", "state", "final loss", "validation loss", "peak memory, GiB", "tokens/s"]
    cards = [Card("Jobs", table(columns, rows, numbers_from=3), wide=True)]
    training = [_curve(job, setting, "loss") for job, setting in zip(jobs, settings)]
    for line in training:
        line.y = smoothed(line.y) or line.y
    validation = [_curve(job, setting, "eval_loss", dots=True) for job, setting in zip(jobs, settings)]
    cards += _varied_cards(jobs)
    for heading, lines in (("Training loss", training), ("Validation loss", validation)):
        cards.append(Card(heading, chart(line_chart(lines, format_y=".4f")), wide=True))
    return render_page(
        f"Sweep {sweep_dir.resolve().name}", subtitle="  ·  ".join(shared), numbers=headlines, cards=cards
    )


def _name(job: JobRecord, marked: str) -> str | Link:
    page = RunDirectory(job.run_dir).report
    text = f"{job.number}{marked}"
    is_ours = page.is_file() and begins_with(page, PAGE_START)
    return Link(text, quote(f"{job.run_dir.name}/{page.name}")) if is_ours else text


def _varied_cards(jobs: list[JobRecord]) -> list[Card]:
    """Return a chart of each key that the sweep varied: its values against the loss of the jobs that finished."""
    finished = [job for job in jobs if job.state == "finished"]
    by_eval = bool(finished) and all(job.eval_loss is not None for job in finished)
    chosen = [dict(text.split("=", 1) for text in job.overrides if "=" in text) for job in finished]
    losses = [job.eval_loss if by_eval else job.final_loss for job in finished]
    losses = [None if loss == math.inf else loss for loss in losses]  # which no axis has
    named = [f"job {job.number}: {' '.join(job.overrides)}" for job in finished]
    cards = []
    for key in dict.fromkeys(key for values in chosen for key in values):
        values = [of_job.get(key, "") for of_job in chosen]
        if len(set(values)) > 1:
            heading = f"{'Validation' if by_eval else 'Final training'} loss by {key}"
            cards.append(Card(heading, chart(scatter_chart(values, losses, named, key))))
    return cards


def _curve(job: JobRecord, setting: str, key: str, *, dots: bool = False) -> Series:
    rows = [row for row in job.metrics if key in row]
    label = f"{job.number}: {setting}"
    return Series(label, [row["step"] for row in rows], [row[key] for row in rows], dots=dots, color=job.number)


def _written(value: float | None, write: Callable[[float], str]) -> str:
    return "" if value is None else write(value)
