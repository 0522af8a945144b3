"""One start at a time in a run directory, by a lock and by signs of life from another machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.config import UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.files import write_atomically
from lisa_dist.telemetry import run_lock
from lisa_dist.telemetry.run_lock import check_nobody_trains, hold_run
from tests.support.forkserver import FORKSERVER

PATIENT = 1.0  # seconds


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", PATIENT)


def hold_until_killed(path: Path) -> None:
    lock = hold_run(RunDirectory(path))
    (path / "held").touch()
    signal.pause()
    lock.close()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[BaseProcess]:
    """A process that trains in ``tmp_path``."""
    process = FORKSERVER.Process(target=hold_until_killed, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


def test_a_second_start_is_refused_while_the_first_lives_and_never_after_a_kill(
    tmp_path: Path, holder: BaseProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"run.dir={tmp_path}: process {holder.pid} on {socket.gethostname()} trains there; stop it first, or choose"
    with pytest.raises(UserError, match="trains there"):
        hold_run(RunDirectory(tmp_path))
    for resume in ("auto", "none"):  # it has not made a step yet
        assert main(["train", f"run.dir={tmp_path}", f"checkpoint.resume={resume}"]) == 2
        assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"held", "logs"}, "nothing is written"
    holder.kill()
    holder.join()
    with hold_run(RunDirectory(tmp_path)), hold_run(RunDirectory(tmp_path)):  # twice in a process is its own matter
        pass
    check_nobody_trains(RunDirectory(tmp_path))


@contextmanager
def beating(run: RunDirectory, host: str, *, alive: bool) -> Iterator[None]:
    """There is a sign of life of another process, which is written again and again where that lives."""
    ended = threading.Event()

    def beat() -> None:
        write_atomically(run.heartbeat(0), json.dumps({"host": host, "alive": time.time()}))

    def go_on() -> None:
        while alive and not ended.wait(0.05):
            beat()

    run.logs.mkdir(exist_ok=True)
    beat()
    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_run_on_another_machine_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    with beating(run, "node7", alive=True), pytest.raises(UserError, match="a process on node7 trains there"):
        hold_run(run)
    started = time.monotonic()
    with beating(run, "node7", alive=False), hold_run(run):  # requeued, soon after a kill
        assert time.monotonic() - started > PATIENT
    with monkeypatch.context() as context:
        context.setattr(run_lock.time, "sleep", lambda seconds: pytest.fail("the lock says it at once"))
        with beating(run, socket.gethostname(), alive=False), hold_run(run):
            pass
    os.utime(run.heartbeat(0), (time.time() - 100,) * 2)
    hold_run(run).close()


def test_a_lock_that_is_held_is_never_passed_over(tmp_path: Path, holder: BaseProcess) -> None:
    """It may be of a start on another machine that still prepares; what is to be done where that is gone is said."""
    run = RunDirectory(tmp_path)
    for written, who in ((json.dumps({"host": "node7", "pid": 5}), "process 5 on node7"), ("", "a process on this")):
        run.lock.write_text(written)
        with pytest.raises(UserError, match=f"{who}.* trains there") as told:
            check_nobody_trains(run)
    run.lock.write_text(json.dumps({"host": "node7", "pid": 5}))
    with pytest.raises(UserError) as told:
        hold_run(run)
    assert str(told.value).endswith(f"(if node7 is gone, delete {run.lock})")
    run.lock.unlink()
    hold_run(run).close()


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_signs_of_life_decide(tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    run = RunDirectory(tmp_path)
    hold_run(run).close()
    hold: Callable[[], None] = lambda: hold_run(run).close()  # noqa: E731
    with beating(run, socket.gethostname(), alive=alive):
        if alive:
            with pytest.raises(UserError, match="trains there"):
                hold()
        else:
            hold()
