"""Who lags, by the ranks' notes."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from threading import Timer
from unittest import mock

import pytest

from lisa_dist.config import StorageError
from lisa_dist.config.paths import refusal
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed
from lisa_dist.runtime.heartbeat import Heartbeat, LostRankError


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)


def note(run_dir: Path, rank: int, order: int, part: str, alive: float = 0) -> None:
    now = time.time()
    content = {"step": 7, "order": order, "part": part, "host": "node2", "noted": now - 40, "alive": now - alive}
    (run_dir / "logs" / f"heartbeat_{rank}.json").write_text(json.dumps(content))


def test_ranks_behind_are_named(three_ranks: None, tmp_path: Path) -> None:
    with Heartbeat(RunDirectory(tmp_path), timeout=100) as heartbeat:
        heartbeat.tick = 0.01  # nobody else writes
        heartbeat.begin_step(7)
        with heartbeat.phase("forward"), heartbeat.phase("backward"):
            order = heartbeat.note.order
            note(tmp_path, 1, order, "backward")
            note(tmp_path, 2, order - 1, "forward")
            explained = heartbeat.explain()
            assert (
                explained
                == "rank 0 waited in backward of step 7; rank 2 on node2 is behind, for 40 s in forward of step 7"
            )
            (tmp_path / "logs" / "heartbeat_1.json").write_text("torn")
            assert "rank 1 left no note" in heartbeat.explain()
            note(tmp_path, 1, order, "backward", alive=60)
            note(tmp_path, 2, order, "backward")
            stands = "rank 1 on node2 stands still, last seen 60 s ago in backward of step 7"
            assert heartbeat.explain() == f"rank 0 waited in backward of step 7; {stands}"
            note(tmp_path, 1, order, "backward")
            assert heartbeat.explain().endswith("no rank is known to be behind it")
        assert heartbeat.note.part == "between steps"


def test_a_rank_that_lives_is_asked_where_it_is_now(three_ranks: None, tmp_path: Path) -> None:
    """Its note on disk may be a tick old, so whoever explains a standstill waits for the next one."""
    with Heartbeat(RunDirectory(tmp_path), timeout=100) as heartbeat:
        heartbeat.begin_step(7)
        order = heartbeat.note.order
        note(tmp_path, 1, order - 5, "forward")
        note(tmp_path, 2, order - 5, "forward")
        written = [
            Timer(0.05, note, (tmp_path, 1, order, "between steps")),
            Timer(0.1, note, (tmp_path, 2, 1, "backward")),
        ]
        for timer in written:
            timer.start()
        assert heartbeat.explain().endswith("of step 7; rank 2 on node2 is behind, for 40 s in backward of step 7")


def test_steps_and_phases_touch_no_file(tmp_path: Path) -> None:
    with Heartbeat(RunDirectory(tmp_path), timeout=100) as heartbeat:
        file = tmp_path / "logs" / "heartbeat_0.json"
        before = file.read_text()
        with mock.patch.object(heartbeat, "_write", side_effect=AssertionError("written")):
            for step in range(1, 4):
                heartbeat.begin_step(step)
                with heartbeat.phase("forward"), heartbeat.phase("backward"):
                    pass
            assert file.read_text() == before
    assert json.loads(file.read_text())["step"] == 3, "the last note is written at the end"


def test_errors_of_collectives_alone_are_explained(tmp_path: Path) -> None:
    with Heartbeat(RunDirectory(tmp_path), timeout=100) as heartbeat:
        lost = heartbeat.explained(RuntimeError("[gloo/transport/tcp] Connection closed by peer\nand more"))
        assert isinstance(lost, LostRankError) and "Connection closed by peer" in str(lost)
        for error in (RuntimeError("shapes do not match"), ValueError("gloo"), KeyboardInterrupt()):
            assert heartbeat.explained(error) is error


def test_a_path_refused_in_the_midst_of_a_run_is_no_mistake_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with Heartbeat(RunDirectory(tmp_path), timeout=100) as heartbeat:
        heartbeat.begin_step(7)
        with pytest.raises(NotADirectoryError) as refused, heartbeat.phase("checkpoint"):
            (tmp_path / "checkpoints" / "x").touch()
        failure = heartbeat.explained(refused.value)
        assert isinstance(failure, StorageError) and not refusal(failure)
        told = f"{tmp_path}/checkpoints/x: Not a directory; name a path that this account may use"
        assert str(failure) == f"{told} (in checkpoint of step 7)"


def test_a_full_disk_ends_no_sign_of_life(tmp_path: Path) -> None:
    heartbeat = Heartbeat(RunDirectory(tmp_path), timeout=100)
    heartbeat._file = os.open("/dev/full", os.O_WRONLY)
    with heartbeat:
        heartbeat.explain()


def test_the_watcher_speaks_once_where_nothing_moves(
    three_ranks: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with Heartbeat(RunDirectory(tmp_path), timeout=0.5) as heartbeat:
        with heartbeat.phase("checkpoint", may_take_long=True):
            time.sleep(0.8)
        assert not caplog.records
        with heartbeat.phase("forward"):
            while not caplog.records:
                time.sleep(0.01)
    assert "waited in forward of step 0" in caplog.text
