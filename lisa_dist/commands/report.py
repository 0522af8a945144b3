"""``lisa-dist report run.dir=DIR``: a run directory becomes one page, ``report.html`` in it."""

from __future__ import annotations

import time

from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.launching.sweeps.comparison import PAGE_FILE, write_comparison
from lisa_dist.telemetry.history import state_of
from lisa_dist.telemetry.reports.run_page import SECONDS_BETWEEN_PAGES, write_report


def run(config: Config) -> int:
    """Write the page of ``run.dir``, or the comparison of ``sweep.dir``, and print where it is.

    Raises:
        UserError: no directory is named, or there is nothing in it to report.
    """
    if config.run.dir is None and config.sweep.dir is not None:
        if config.report.watch:
            raise UserError("--watch: the report of a run is watched, a sweep writes its own anew after each job")
        sweep_dir = local_path(config.sweep.dir)
        try:
            write_comparison(sweep_dir)
        except OSError as error:
            raise UserError(f"sweep.dir={sweep_dir}: its pages can't be written, {error.strerror}") from None
        print(sweep_dir / PAGE_FILE)
        return EXIT_DONE
    if config.run.dir is None:
        raise UserError("run.dir=null: name the directory of a run, as in lisa-dist report run.dir=runs/NAME")
    run = RunDirectory.of(config)
    try:
        path = write_report(run, live=config.report.watch)
    except OSError as error:
        raise UserError(f"run.dir={run.path}: its page can't be written, {error.strerror}") from None
    print(path, flush=True)
    if config.report.watch:
        watch(run)
    return EXIT_DONE


def watch(run: RunDirectory) -> None:
    """Write the page anew until the run has ended or the user interrupts; then once more, as one that stays."""
    print("the page is kept up to date until the run ends, Ctrl-C stops that", flush=True)
    try:
        while state_of(run).name in ("starting", "running"):
            write_report(run, live=True)
            time.sleep(SECONDS_BETWEEN_PAGES)
    except KeyboardInterrupt:
        print("no longer kept up to date")
    finally:
        write_report(run)
