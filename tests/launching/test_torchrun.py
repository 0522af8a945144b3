"""launch/torchrun_node.sh: two machines, played by two agents on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tiny import TINY, free_ports, held, read_summary, rows_of_steps

SCRIPT = Path(__file__).parents[2] / "launch" / "torchrun_node.sh"
PATIENCE = 600  # seconds for what hangs
STEPS, HELD_AT = 16, 6


class Machines:
    """Starts the script as on machines of its own; each one is a process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports()
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, rank: int, nodes: str, *overrides: str, **settings: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "NODES": nodes, "RANKS": "1",
            "NODE_RANK": str(rank), "PYTHON": sys.executable, **settings,
        }  # fmt: skip
        with (self.folder / f"machine_{rank}.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", str(SCRIPT), *TINY, *overrides],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def output(self, rank: int) -> str:
        return (self.folder / f"machine_{rank}.log").read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, [self.output(rank)[-3000:] for rank in range(len(self.started))]
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                for member in members(process):
                    os.kill(member, signal.SIGKILL)
            process.wait()


def members(machine: subprocess.Popen[bytes]) -> list[int]:
    """Return the processes of a machine: the agent starts each rank in a session of its own."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in told.splitlines())}
    found = [machine.pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path)
    yield machines
    machines.close()


def step_of_rank_1(run_dir: Path) -> int:
    """Return the step that the rank on the second machine is at, 0 before its first."""
    note = run_dir / "logs" / "heartbeat_1.json"
    return json.loads(note.read_text() or "{}").get("step", 0) if note.exists() else 0


@pytest.mark.soak
def test_run_goes_on_without_a_lost_machine(machines: Machines, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"train.max_steps={STEPS}", "data.limit=32", "checkpoint.every=5", f"run.dir={run_dir}"]
    lost = tmp_path / "lost"
    first, second = (machines.start(rank, "1:2", *overrides, **held(HELD_AT, lost)) for rank in (0, 1))
    # Where the second is late, the first begins alone, saves when it joins, and both go on from there.
    machines.wait_until(lambda: step_of_rank_1(run_dir) > HELD_AT)
    for process in members(second):
        os.kill(process, signal.SIGKILL)
    lost.touch()
    assert first.wait(PATIENCE) == 0, machines.output(0)[-3000:]
    summary = read_summary(run_dir)
    assert summary["exit_reason"] == "finished"
    assert 5 <= summary["resumed_from"][-1] <= HELD_AT + 2
    rows = rows_of_steps(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # 32 rows are 8 global batches: however many ranks train it, an epoch has the same label tokens.
    epochs = [sum(row["label_tokens"] for row in rows[first : first + 8]) for first in range(0, STEPS, 8)]
    assert len(set(epochs)) == 1


def test_machine_that_finds_nobody_says_so(machines: Machines) -> None:
    process = machines.start(1, "2", WAIT="1")
    assert process.wait(PATIENCE) == 1
    assert machines.output(1) == (
        f"torchrun_node.sh: nobody answers at 127.0.0.1:{machines.port} after 1 s (Connection refused): is the "
        "machine with NODE_RANK=0 up, and is the port open?\n"
    )


@pytest.mark.parametrize("name", ["MASTER_ADDR", "NODES", "NODE_RANK"])
def test_setting_that_is_missing(name: str) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "NODES": "2", "NODE_RANK": "0", "PATH": os.environ["PATH"]}
    del settings[name]
    result = subprocess.run(["bash", str(SCRIPT)], env=settings, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{name}: set it to" in result.stderr
