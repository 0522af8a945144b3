"""A launcher and its ranks as real processes, for tests that signal and kill them."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

from lisa_dist.config import Config, ParallelConfig, RunConfig

PATIENCE = 600  # seconds for what hangs


def local_ranks(run_dir: Path, name: str | None = None, ranks: int = 2) -> Config:
    return Config(parallel=ParallelConfig(nproc_per_node=str(ranks)), run=RunConfig(dir=str(run_dir), name=name))


class Launcher:
    """A launcher in a process group of its own, training until it is stopped; its stdout is a terminal."""

    def __init__(self, run_dir: Path, seconds_to_save: float, ranks: int) -> None:
        self.run_dir, self.num_ranks = run_dir, ranks
        terminal, its_end = pty.openpty()
        call = (
            "import sys; from pathlib import Path; from lisa_dist.launching.local import launch_ranks;"
            "from tests.support import programs; from tests.support.launcher import local_ranks;"
            f"sys.exit(launch_ranks(local_ranks(Path({str(run_dir)!r}), '{seconds_to_save}', {ranks}),"
            " programs.train_until_stopped))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", call],
            stdout=its_end,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        os.close(its_end)
        self.terminal = terminal

    def wait_for(self, *patterns: str) -> list[Path]:
        """Wait for a file of each pattern and return them."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [next(self.run_dir.glob(pattern), None) for pattern in patterns]
            if None not in found:
                return [path for path in found if path is not None]
            assert time.monotonic() < deadline and self.process.poll() is None, (patterns, self.process.poll())
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """The process ids of the ranks, once they train."""
        return [int(path.name.split("_")[2]) for path in self.wait_for(*self.every_rank("training_{}_*"))]

    def every_rank(self, pattern: str) -> list[str]:
        return [pattern.format(rank) for rank in range(self.num_ranks)]

    def press_control_c(self) -> None:
        """What a terminal does: INT to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        os.close(self.terminal)
