"""What ranks run in the tests of the launcher: no model, only its own way to end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, Config, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.signals import stop_requested
from lisa_dist.telemetry.out_of_memory import explaining_out_of_memory
from lisa_dist.telemetry.records import write_summary


def rank() -> int:
    return int(os.environ["RANK"])


def finish(config: Config) -> int:
    """Print who we are, three ways, and end well."""
    print(f"rank {rank()} of {os.environ['WORLD_SIZE']} with run.name={config.run.name}")
    print(f"rank {rank()} on stderr", file=sys.stderr)
    os.system(f"echo rank {rank()} natively")
    if rank() == 0:
        print(f"rank 0 reads {sys.stdin.readline()!r}")
    return EXIT_DONE


def fail(config: Config) -> int:
    """Rank 1 fails; rank 0 fails a moment later, as it does when its peer is gone, and sums up what it knows."""
    if rank() == 1:
        _wait_for_rank_0(config)
        raise ValueError("the first failure")
    _wait_for_the_end_of_rank_1(config)
    write_summary(RunDirectory.of(config), exit_reason="failed: a connection was lost", resumed_from=[3])
    raise RuntimeError("a connection was lost")


def die(config: Config) -> int:
    """Rank 1 is killed by the system; rank 0 then fails."""
    if rank() == 1:
        _wait_for_rank_0(config)
        os.kill(os.getpid(), signal.SIGKILL)
    _wait_for_the_end_of_rank_1(config)
    raise RuntimeError("a connection was lost")


def run_out_of_memory(config: Config) -> int:
    """The forward pass finds no memory."""
    with explaining_out_of_memory(config, lambda: "forward of step 3"):
        raise MemoryError("all of it")


def mistake(config: Config) -> int:
    """Every rank finds the same mistake of the user."""
    raise UserError("data.path=nowhere: must be a file")


def be_refused(config: Config) -> int:
    """Every rank is refused a file by the system."""
    raise PermissionError(errno.EACCES, "Permission denied", "/closed/model.safetensors")


def disagree(config: Config) -> int:
    """Rank 1 says that it was stopped, rank 0 that it is done."""
    return EXIT_STOPPED if rank() == 1 else EXIT_DONE


def train_until_stopped(config: Config) -> int:
    """Run until asked to stop, then take ``run.name`` seconds to save; files tell how far a rank has come."""
    run_dir = Path(config.run.dir or "")
    (run_dir / f"training_{rank()}_{os.getpid()}").write_text(f"terminal: {sys.stdout.isatty()}")
    while not stop_requested():
        time.sleep(0.02)
    (run_dir / f"saving_{rank()}").touch()
    time.sleep(float(config.run.name or 0))
    (run_dir / f"saved_{rank()}").touch()
    return EXIT_STOPPED


def _wait_for_rank_0(config: Config) -> None:
    """Wait until rank 0 is up: the launcher kills a rank that takes half a minute to end after another has failed."""
    while not (Path(config.run.dir or "") / "rank_0_is_up").exists():
        time.sleep(0.02)


def _wait_for_the_end_of_rank_1(config: Config) -> None:
    """Wait until the launcher asks this rank to stop, which it does when rank 1 has failed."""
    (Path(config.run.dir or "") / "rank_0_is_up").touch()
    while not stop_requested():
        time.sleep(0.02)
