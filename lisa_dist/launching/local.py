"""Starts the ranks of this machine through torch's elastic agent, in this process.

The configuration is handed to the ranks as it is: nothing is parsed a second time. The launcher decides what a
signal means, gathers the exit codes and shows the first failure, and only that one. No rank outlives it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lisa_dist.config import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    Config,
    ParallelConfig,
    ResourceError,
    UserError,
)
from lisa_dist.config.checks import check_grid
from lisa_dist.config.paths import refusal
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.launching.stop_watcher import StopWatcher
from lisa_dist.runtime.files import make_folder
from lisa_dist.runtime.redaction import hide_secrets
from lisa_dist.runtime.signals import die_with, install_stop_handlers
from lisa_dist.telemetry.out_of_memory import advice
from lisa_dist.telemetry.records import record_failure, summary_is_new

SECONDS_TO_LEAVE = 5
OUT_OF_MEMORY = ", as the system does when memory runs out"
SHUTDOWN_SECONDS = 30  # torch kills the other ranks this long after one has failed

Entry = Callable[[Config], int]  # what every rank runs


@dataclass
class Outcome:
    """How one rank ended; written by the rank, read by the launcher."""

    rank: int
    code: int
    message: str  # of the error, else empty
    traceback: str  # of a fault of the program, else empty
    time: float  # seconds since the epoch


def launch_ranks(config: Config, entry: Entry, log_dir: Path | None = None) -> int:
    """Run ``entry`` on every rank of this machine and return the exit code of the whole.

    Args:
        config: with ``run.dir`` settled where ``entry`` trains.
        entry: returns an exit code; a function at the top of a module, for the ranks import it.
        log_dir: of an ``entry`` that saves nothing, so that a first signal ends it: logs go to
            ``log_dir/logs/rank_N.log``, and the run's summary.json is left alone; None: they go to ``run.dir``, and a
            failure is noted in the summary.

    Returns:
        0 where every rank returned 0, 75 where every rank stopped on a signal, else 1.

    Raises:
        UserError: the configuration asks for what this machine has not, or a rank raised one.
        KeyboardInterrupt: a signal came, and the entry saves nothing.
    """
    ranks = count_local_ranks(config.parallel)
    parallel = config.parallel
    check_grid(ranks, parallel.replicate, parallel.ranks_of_replica(ranks))  # refused before there are ranks
    run = RunDirectory(log_dir or Path(config.run.dir or "."))
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="lisa-dist-") as folder:
        outcome_dir = Path(folder)
        with StopWatcher(outcome_dir, saves=log_dir is None) as watcher:
            make_folder(run.logs, f"run.dir={run.path}")
            agent_failure = _run_agent(config, entry, ranks, outcome_dir, run.path)
        outcomes = [Outcome(**json.loads(file.read_text())) for file in outcome_dir.glob("outcome_*.json")]
    codes = {outcome.code for outcome in outcomes}
    if len(outcomes) == ranks and codes in ({EXIT_DONE}, {EXIT_STOPPED}):
        return codes.pop()
    if watcher.received and not watcher.saves:
        raise KeyboardInterrupt
    mistakes = [outcome for outcome in outcomes if outcome.code == EXIT_USER_ERROR]
    first = min(mistakes, key=lambda o: o.time) if mistakes else _first_failure(outcomes, ranks, agent_failure)
    if watcher.kill and first.message.endswith(OUT_OF_MEMORY):  # it was we who killed it
        first = replace(first, message=first.message.replace(OUT_OF_MEMORY, ", as asked"))
    on_cpu = torch.cuda.device_count() == 0  # else host memory ran out, which does not hold the model
    if first.message.endswith(OUT_OF_MEMORY) and on_cpu:
        remedy = advice(config, entry.__name__, ranks=ranks, local_ranks=ranks, on_gpu=False)
        first = replace(first, message=f"{first.message}; {remedy}")
    if log_dir is None:
        _record_failure(run, first, started)
    if mistakes:
        raise UserError(first.message)
    print(
        f"{first.traceback}lisa-dist: rank {first.rank} failed: {first.message}; its log is {run.rank_log(first.rank)}",
        file=sys.stderr,
    )
    return EXIT_FAILED


def count_local_ranks(config: ParallelConfig) -> int:
    """Return the number of ranks to start here: the visible GPUs, without GPUs 1, or as many as are asked for."""
    gpus = torch.cuda.device_count()
    wanted = config.nproc_per_node
    if wanted == "auto":
        return max(gpus, 1)
    if 0 < gpus < int(wanted):
        raise UserError(
            f"parallel.nproc_per_node={wanted}: must be at most {gpus}, the number of visible GPUs, or auto"
        )
    return int(wanted)


def _run_agent(config: Config, entry: Entry, ranks: int, outcome_dir: Path, log_dir: Path) -> ChildFailedError | None:
    """Start the ranks and wait for their end; returns what the agent says where a rank died."""
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # else 20 lines about a failure that we show ourselves
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="forkserver",
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the others are ours: the agent's handlers would lose the ranks' exit codes
        logs_specs=DefaultLogsSpecs(log_dir=str(outcome_dir / "agent")),
    )
    old_quit_handler = signal.getsignal(signal.SIGQUIT)
    try:
        elastic_launch(launch_config, run_rank)(entry, config, outcome_dir, log_dir, os.getpid())
    except ChildFailedError as failure:
        return failure
    finally:
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
        signal.signal(signal.SIGQUIT, old_quit_handler)
    return None


def run_rank(entry: Entry, config: Config, outcome_dir: Path, log_dir: Path, launcher: int) -> int:
    """Run ``entry`` in this process, which is a rank, and leave an :class:`Outcome` in ``outcome_dir``.

    A code without a failure is returned, so that the agent waits for the other ranks; a failure ends the
    process at once, so that the agent ends the others.
    """
    die_with(os.getppid())  # the server that ranks are forked from, which ends when the launcher does
    if not Path(f"/proc/{launcher}").exists():
        os._exit(EXIT_FAILED)
    gc.enable()
    install_stop_handlers(ignore_interrupt=True)
    rank = int(os.environ["RANK"])
    (outcome_dir / f"started_{rank}_{os.getpid()}").touch()
    log = RunDirectory(log_dir).rank_log(rank)
    if rank > 0:
        _send_output_to(log)
    else:
        _read_from(launcher)
    # Line by line, as in a terminal: else what is printed comes after what native code and later processes print.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code, message, trace = EXIT_FAILED, "", ""
    try:
        code = entry(config)
    except UserError as error:
        code, message = EXIT_USER_ERROR, str(error)
    except ResourceError as error:
        message = hide_secrets(str(error))
        if config.run.dir is None or RunDirectory.of(config).path != log_dir:  # else training has written it there
            _write_traceback(log)
    except BaseException as error:  # whatever it is, the launcher shows it
        message, trace = hide_secrets(f"{type(error).__name__}: {error}"), _write_traceback(log)
        if refused := refusal(error):
            code, message = EXIT_USER_ERROR, refused
    outcome = Outcome(rank, code, message, trace, time.time())
    partial = outcome_dir / f"partial_{rank}"
    partial.write_text(json.dumps(asdict(outcome)))
    partial.rename(outcome_dir / f"outcome_{rank}.json")
    if code in (EXIT_DONE, EXIT_STOPPED):
        return code
    _leave_soon(code)


def _write_traceback(log: Path) -> str:
    """Append the traceback of the error that is being handled to ``log``, and return it."""
    trace = hide_secrets(traceback.format_exc())
    with suppress(OSError), log.open("a", encoding="utf-8") as file:  # a full disk has no room for it
        file.write(trace)
    return trace


def _send_output_to(log: Path) -> None:
    """Append to ``log`` what this process prints, native code too; rank 0 alone keeps the terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _read_from(launcher: int) -> None:
    """Read what the launcher is given on stdin: by itself multiprocessing leaves its processes nothing to read."""
    with suppress(OSError), Path(f"/proc/{launcher}/fd/0").open("rb") as theirs:  # closed, or of another user
        os.dup2(theirs.fileno(), 0)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def _leave_soon(code: int) -> NoReturn:
    """End this process with ``code``, and by force where its end hangs in a process group that has lost a rank."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS_TO_LEAVE)
    sys.exit(code)


def _first_failure(outcomes: list[Outcome], ranks: int, agent_failure: ChildFailedError | None) -> Outcome:
    """Return the failure that the others follow from: they lose their connection to the rank that failed first."""
    now = time.time()
    failed = sorted((outcome for outcome in outcomes if outcome.code != EXIT_DONE), key=lambda outcome: outcome.time)
    silent = sorted(set(range(ranks)) - {outcome.rank for outcome in outcomes})
    # A rank without an outcome was killed: by torch, long after another one failed, or as the first of all.
    if silent and not (failed and now - failed[0].time > SHUTDOWN_SECONDS - 1):
        return Outcome(silent[0], EXIT_FAILED, _how_it_died(silent[0], agent_failure), "", now)
    if failed:
        return replace(failed[0], message=failed[0].message or f"it ended with code {failed[0].code}")
    return Outcome(0, EXIT_FAILED, f"the agent ended early, {agent_failure}", "", now)


def _how_it_died(rank: int, agent_failure: ChildFailedError | None) -> str:
    failure = agent_failure.failures.get(rank) if agent_failure else None
    if failure is None or failure.exitcode >= 0:
        return "it was killed"  # torch tells of one rank alone, and another one ended at about the same time
    name = signal.Signals(-failure.exitcode).name
    return f"it was killed by {name}" + (OUT_OF_MEMORY if name == "SIGKILL" else "")


def _record_failure(run: RunDirectory, failure: Outcome, started: float) -> None:
    """Leave the reason in summary.json, unless rank 0 has, which knows only its own; a mistake writes over nothing."""
    by_rank_0 = failure.rank == 0 and summary_is_new(run, started)
    if not by_rank_0 and not (run.summary.exists() and failure.code == EXIT_USER_ERROR):
        with suppress(OSError):  # a full disk has no room for it, and the failure is told
            record_failure(run, failure.message)
