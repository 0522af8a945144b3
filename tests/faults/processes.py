"""Runs as a user starts them, through the command line, and the processes that they consist of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lisa_dist.telemetry.records import read_rows
from tests.checkpoint.runs import ARCHITECTURE

OVERRIDES = [
    "model=custom",
    "model.init=random",
    "model.tokenizer=builtin:demo",
    "data=demo",
    "data.limit=60",
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
PATIENCE = 200  # seconds for anything


class Launched:
    """``lisa-dist train`` with its two ranks, in a process group of its own."""

    def __init__(self, run_dir: Path, *overrides: str, program: list[str] | None = None) -> None:
        self.run_dir = run_dir
        self.temporary = run_dir.parent / f"{run_dir.name}_tmp"  # where the launcher notes its ranks
        self.temporary.mkdir(exist_ok=True)
        self.known = set(self.temporary.rglob("started_*"))
        environment = {**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [*(program or [sys.executable, "-m", "lisa_dist"]), "train", *OVERRIDES, f"run.dir={run_dir}", *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def rank_process(self, rank: int) -> int:
        """The process id of a rank."""
        found: list[Path] = []

        def is_up() -> bool:
            found[:] = sorted(set(self.temporary.rglob(f"started_{rank}_*")) - self.known)
            return bool(found)

        wait_until(is_up, f"rank {rank} to start")
        return int(found[-1].name.split("_")[2])

    def wait_for_step(self, step: int) -> None:
        """Wait until ``step`` is recorded, or the run has ended."""
        metrics = self.run_dir / "metrics.jsonl"

        def is_done() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"the run ended before step {step}:\n{self.process.stdout.read()}")
            return any(row["step"] >= step and "loss" in row for row in read_rows(metrics))

        wait_until(is_done, f"step {step}")

    def kill(self, process: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process of this run."""
        os.kill(process, number)

    def finish(self, patience: float = PATIENCE) -> tuple[int, str]:
        """The exit code and what was printed."""
        output, _ = self.process.communicate(timeout=patience)
        return self.process.returncode, output


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, at most as long as anything may take."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.01)
