"""Runs as a user starts them, through the command line, and the processes that they consist of."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed.launcher.api import LaunchConfig

from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.cli import main
from lisa_dist.launching import local, rank_server
from lisa_dist.telemetry.records import read_rows
from tests.support.forkserver import FORKSERVER
from tests.support.runs import ARCHITECTURE

T = TypeVar("T")

OVERRIDES = [
    "model=custom",
    "model.init=random",
    "model.tokenizer=builtin:demo",
    "data=demo",
    "data.limit=60",
    "train.eval_batches=2",
    "data.sequence_length=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "sampler.period=3",
    "sampler.active_layers=2",
    "optimizer.lr=0.01",
    "parallel.cpu_threads=1",
    "parallel.nproc_per_node=2",
    "checkpoint.keep=2",
    f"model.architecture={ARCHITECTURE.replace('DROPOUT', '0.1')}",
]
PATIENCE = 600  # seconds for what hangs


def _fork_ranks(**settings: Any) -> LaunchConfig:
    return LaunchConfig(**{**settings, "start_method": "fork"})


def _run_forked_rank(*args: Any) -> int:
    signal.set_wakeup_fd(-1)  # the launcher's, which a forked process shares
    return local.run_rank(*args)


def fork_ranks() -> None:
    """Let launchers in this process fork their ranks, which is quick, in place of starting a server that does."""
    rank_server.start_rank_server = lambda: None
    elastic_launch = local.elastic_launch
    local.elastic_launch = lambda config, entry: elastic_launch(config, _run_forked_rank)
    local.LaunchConfig = _fork_ranks


def send_output_to(stdout: Path, stderr: Path) -> None:
    """Append what this process and its children print."""
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)


def _launch(arguments: list[str], output: Path, temporary: Path) -> None:
    """Be a launcher: the command line, with output to a file and a folder of its own for temporary files."""
    os.setsid()
    output.unlink(missing_ok=True)
    send_output_to(output, output)
    tempfile.tempdir = str(temporary)
    fork_ranks()
    sys.exit(main(["train", *arguments]))


class Launched:
    """``lisa-dist train`` with its two ranks, in a session of its own."""

    def __init__(self, run_dir: Path, *overrides: str) -> None:
        self.run_dir = run_dir
        self.temporary = run_dir.parent / f"{run_dir.name}_tmp"  # where the launcher notes its ranks
        self.temporary.mkdir(exist_ok=True)
        self.known = set(self.temporary.rglob("started_*"))
        self.saved = self._checkpoints()
        self.output = self.temporary / "output"
        arguments = [*OVERRIDES, f"run.dir={run_dir}", *overrides]
        self.process = FORKSERVER.Process(target=_launch, args=(arguments, self.output, self.temporary))
        self.process.start()

    @property
    def pid(self) -> int:
        """The process id of the launcher."""
        assert self.process.pid is not None
        return self.process.pid

    def rank_process(self, rank: int) -> int:
        """The process id of a rank."""
        found: list[Path] = []

        def is_up() -> bool:
            found[:] = sorted(set(self.temporary.rglob(f"started_{rank}_*")) - self.known)
            return bool(found)

        wait_until(is_up, f"rank {rank} to start")
        return int(found[-1].name.split("_")[2])

    def outcome_is_known(self, rank: int) -> bool:
        """Whether a rank has left how it ended, or nothing of the run is left."""
        return bool(list(self.temporary.rglob(f"outcome_{rank}.json"))) or not self.process.is_alive()

    def wait_for_checkpoint(self) -> None:
        """Wait until this start has completed a checkpoint: steps alone may be those that an earlier one recorded."""
        wait_until(lambda: bool(self._while_it_runs(self._checkpoints) - self.saved), "a checkpoint")

    def wait_for_step(self, step: int) -> None:
        """Wait until ``step`` is recorded, which no earlier start may have done."""
        wait_until(lambda: self._while_it_runs(lambda: last_step(self.run_dir)) >= step, f"step {step}")

    def _checkpoints(self) -> set[str]:
        return {path.name for path in list_checkpoints(self.run_dir / "checkpoints")}

    def _while_it_runs(self, look: Callable[[], T]) -> T:
        alive, seen = self.process.is_alive(), look()
        if not alive:
            raise AssertionError(f"the run has ended:\n{self.output.read_text()}")
        return seen

    def finish(self) -> tuple[int, str]:
        """The exit code and what was printed."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"the run goes on after {PATIENCE} s"
        return self.process.exitcode, self.output.read_text()


def last_step(run_dir: Path) -> int:
    """The last step that is recorded, 0 where none is."""
    return max((row["step"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row), default=0)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, at most as long as anything may take."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.05)
