"""Two hosts on this machine: network namespaces with a cable between them that can be cut and slowed down."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.launching.tiny import SYSTEM_PATH

PATIENCE = 400
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29700


def ip(*arguments: str) -> None:
    environment = {**os.environ, "PATH": SYSTEM_PATH}
    subprocess.run(["ip", *arguments], env=environment, check=True, capture_output=True, text=True)


class Hosts:
    """The two hosts; each one's end of the cable is called v1 and v2."""

    def __init__(self) -> None:
        self.names = [f"lisa{os.getpid()}h{number}" for number in (1, 2)]
        self.made: list[str] = []

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            self.made.append(name)
        first, second = self.names
        ip("link", "add", "v1", "netns", first, "type", "veth", "peer", "name", "v2", "netns", second)
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES), start=1):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{number}")
            for device in ("lo", f"v{number}"):
                ip("-n", name, "link", "set", device, "up")

    def remove(self) -> None:
        for name in self.made:
            ip("netns", "del", name)

    def plug(self, *, connected: bool) -> None:
        """Plug the cable in, or pull it out."""
        ip("-n", self.names[0], "link", "set", "v1", "up" if connected else "down")

    def slow_down(self, rate: str) -> None:
        """Let through only so much, such as ``100mbit``, in each direction."""
        for number, name in enumerate(self.names, start=1):
            command = ["tc", "-n", name, "qdisc", "replace", "dev", f"v{number}", "root", "tbf", "rate", rate]
            command += ["burst", "64kb", "latency", "400ms"]
            subprocess.run(command, env={**os.environ, "PATH": SYSTEM_PATH}, check=True, capture_output=True)

    def full_speed(self) -> None:
        for number, name in enumerate(self.names, start=1):
            command = ["tc", "-n", name, "qdisc", "del", "dev", f"v{number}", "root"]
            subprocess.run(command, env={**os.environ, "PATH": SYSTEM_PATH}, check=True, capture_output=True)


class Run:
    """A run of two ranks, one on each host."""

    def __init__(self, hosts: Hosts, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs = [folder / f"host_{rank}.log" for rank in (0, 1)]
        for rank, host in enumerate(hosts.names):
            settings = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": "2", "RANK": str(rank)}
            settings |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            program = ["ip", "netns", "exec", host, sys.executable, "-m", "tests.network.program"]
            with self.logs[rank].open("wb") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*program, str(self._counts(rank)), *overrides],
                        env={**os.environ, **settings},
                        stdout=log,
                        stderr=log,
                        cwd=Path(__file__).parents[2],
                    )
                )

    def _counts(self, rank: int) -> Path:
        return self.folder / f"bytes_{rank}.json"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < deadline, [log.read_text()[-3000:] for log in self.logs]
            time.sleep(0.1)

    def bytes_of_a_step(self, rank: int) -> float:
        """Return the median over the steps so far, the first ones left out: they open connections."""
        return statistics.median(json.loads(self._counts(rank).read_text())[2:])

    def wait(self) -> list[int]:
        """Wait for the end of both ranks and return their codes."""
        return [process.wait(PATIENCE) for process in self.processes]

    def stop(self, rank: int) -> None:
        """Ask one rank to stop; ``ip netns exec`` has become its process."""
        self.processes[rank].send_signal(signal.SIGTERM)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
