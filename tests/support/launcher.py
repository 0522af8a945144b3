"""A launcher and its ranks as real processes, for tests that signal and kill them."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from pathlib import Path

from lisa_dist.config import EXIT_INTERRUPTED, EXIT_USER_ERROR, Config, ParallelConfig, RunConfig, UserError
from lisa_dist.launching.local import Entry, launch_ranks
from lisa_dist.launching.rank_server import start_rank_server
from lisa_dist.runtime.signals import STOP_SIGNALS
from tests.support.forkserver import FORKSERVER
from tests.support.processes import PATIENCE, fork_ranks, send_output_to


def local_ranks(run_dir: Path, name: str | None = None, ranks: int = 2) -> Config:
    return Config(parallel=ParallelConfig(nproc_per_node=str(ranks)), run=RunConfig(dir=str(run_dir), name=name))


def _launch(config: Config, entry: Entry, terminal: Path, stderr: Path, forked: bool, saves: bool) -> None:
    """Be a launcher."""
    os.setsid()
    send_output_to(terminal, stderr)
    if forked:
        fork_ranks()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as a parent that holds them back leaves it
    else:
        start_rank_server()
    try:
        code = launch_ranks(config, entry, None if saves else Path(str(config.run.dir)))
    except UserError as error:
        print(error, file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("KeyboardInterrupt", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


class Launcher:
    """A launcher in its own process group, whose stdout is a terminal; forked: it forks its ranks itself."""

    def __init__(self, config: Config, entry: Entry, *, forked: bool = True, saves: bool = True) -> None:
        self.run_dir = Path(str(config.run.dir))
        self.num_ranks = int(config.parallel.nproc_per_node)
        self.terminal, its_end = pty.openpty()
        self.output = self.run_dir.parent / f"{self.run_dir.name}_stderr"
        arguments = (config, entry, Path(os.ttyname(its_end)), self.output, forked, saves)
        self.process = FORKSERVER.Process(target=_launch, args=arguments)
        self.process.start()
        self.its_end = its_end  # open, so that the terminal is there whenever the launcher comes to it

    def wait_for(self, *patterns: str) -> list[Path]:
        """Wait for a file of each pattern and return them."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = [next(self.run_dir.glob(pattern), None) for pattern in patterns]
            if None not in found:
                return [path for path in found if path is not None]
            assert time.monotonic() < deadline and self.process.is_alive(), (patterns, self.process.exitcode)
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """The process ids of the ranks, once they train."""
        return [int(path.name.split("_")[2]) for path in self.wait_for(*self.every_rank("training_{}_*"))]

    def every_rank(self, pattern: str) -> list[str]:
        return [pattern.format(rank) for rank in range(self.num_ranks)]

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def press_control_c(self) -> None:
        """What a terminal does: INT to the whole foreground group."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self) -> tuple[int, str]:
        """The exit code, and what was printed on stderr."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"the launcher goes on after {PATIENCE} s"
        return self.process.exitcode, self.output.read_text()

    def close(self) -> None:
        if self.process.is_alive():
            assert self.process.pid is not None
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        os.close(self.terminal)
        os.close(self.its_end)
