"""Two hosts on this machine: network namespaces with a cable between them that can be cut and slowed down."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lisa_dist.runtime.files import write_atomically
from tests.support.forkserver import FORKSERVER
from tests.support.network_program import run_rank
from tests.support.tiny import SYSTEM_PATH

PATIENCE = 600  # seconds for what hangs
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29700


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": SYSTEM_PATH}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def ip(*arguments: str) -> None:
    _run("ip", *arguments)


class Hosts:
    """The two hosts; each one's end of the cable is called v1 and v2, and w1 and w2 of a long cable."""

    def __init__(self) -> None:
        self.names = [f"lisa{os.getpid()}h{number}" for number in (1, 2)]
        self.relay = f"lisa{os.getpid()}r"  # where the long cable is
        self.made: list[str] = []

    def make(self) -> None:
        for name in (*self.names, self.relay):
            ip("netns", "add", name)
            self.made.append(name)
        first, second = self.names
        _link("v1", first, "v2", second)
        for number, (name, address) in enumerate(zip(self.names, ADDRESSES), start=1):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"v{number}")
            ip("-n", name, "link", "set", "lo", "up")
            _link(f"w{number}", name, f"r{number}", self.relay)

    def remove(self) -> None:
        for name in self.made:
            ip("netns", "del", name)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Pull the cable out."""
        ip("-n", self.names[0], "link", "set", "v1", "down")
        try:
            yield
        finally:
            ip("-n", self.names[0], "link", "set", "v1", "up")

    @contextmanager
    def slow(self, rate: str) -> Iterator[None]:
        """Let through only so much, such as ``100mbit``, in each direction."""
        for number, name in enumerate(self.names, start=1):
            limit = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
            _run("tc", "-n", name, "qdisc", "replace", "dev", f"v{number}", "root", *limit)
        try:
            yield
        finally:
            for number, name in enumerate(self.names, start=1):
                _run("tc", "-n", name, "qdisc", "del", "dev", f"v{number}", "root")

    @contextmanager
    def far_apart(self, seconds: float) -> Iterator[None]:
        """Take the long cable, on which a frame is so long under way."""
        program = [sys.executable, str(Path(__file__).with_name("relay.py")), str(seconds)]
        relay = subprocess.Popen(["ip", "netns", "exec", self.relay, *program], env={**os.environ, "PATH": SYSTEM_PATH})
        try:
            for number, (name, other) in enumerate(zip(self.names, reversed(ADDRESSES)), start=1):
                ip("-n", name, "route", "replace", other, "dev", f"w{number}", "src", ADDRESSES[number - 1])
            yield
            assert relay.poll() is None
        finally:
            for name, other in zip(self.names, reversed(ADDRESSES)):
                ip("-n", name, "route", "del", other)
            relay.kill()
            relay.wait()


def _link(device: str, host: str, other_device: str, other_host: str) -> None:
    ip("link", "add", device, "netns", host, "type", "veth", "peer", "name", other_device, "netns", other_host)
    ip("-n", host, "link", "set", device, "up")
    ip("-n", other_host, "link", "set", other_device, "up")


class Run:
    """A run of two ranks, one on each host, that makes ``steps`` steps until more are allowed."""

    def __init__(self, hosts: Hosts, folder: Path, steps: int, *overrides: str) -> None:
        self.folder = folder
        self.allowed = folder / "allowed_steps"
        self.allow(steps)
        self.logs = [folder / f"host_{rank}.log" for rank in (0, 1)]
        self.processes = []
        for rank, host in enumerate(hosts.names):
            settings = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT), "WORLD_SIZE": "2", "RANK": str(rank)}
            settings |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            arguments = (host, settings, self.logs[rank], self._counts(rank), self.allowed, list(overrides))
            self.processes.append(FORKSERVER.Process(target=run_rank, args=arguments))
            self.processes[-1].start()

    def _counts(self, rank: int) -> Path:
        return self.folder / f"bytes_{rank}.json"

    def allow(self, steps: int) -> None:
        """Let the run make so many steps in all."""
        write_atomically(self.allowed, str(steps))

    def train_to(self, steps: int) -> None:
        """Let the run make so many steps in all, and wait until both ranks have made them."""
        self.allow(steps)
        self._wait_until(lambda: self.steps_made() == [steps, steps])

    def steps_made(self) -> list[int]:
        """Return how many steps each rank has made in this start."""
        return [len(self._bytes_of_steps(rank)) for rank in (0, 1)]

    def _bytes_of_steps(self, rank: int) -> list[int]:
        path = self._counts(rank)
        return json.loads(path.read_text()) if path.exists() else []

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            running = all(process.is_alive() for process in self.processes)
            assert running and time.monotonic() < deadline, [log.read_text()[-3000:] for log in self.logs]
            time.sleep(0.1)

    def bytes_of_a_step(self, rank: int) -> float:
        """Return the median over the steps so far, the first ones left out: they open connections."""
        return statistics.median(self._bytes_of_steps(rank)[2:])

    def wait(self) -> list[int | None]:
        """Wait for the end of both ranks and return their codes."""
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
