"""Which files a write leaves behind, whole or cut short, and which checkpoints are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from lisa_dist.checkpoint import protocol
from lisa_dist.checkpoint.changes import CheckpointPlan
from lisa_dist.checkpoint.manifest import checkpoint_name, list_checkpoints, read_dependencies, verify
from lisa_dist.checkpoint.protocol import Snapshot, remove_leftovers, remove_old, write_checkpoint
from lisa_dist.checkpoint.shards import Piece, ShardedTensors
from tests.support.checkpoints import make_checkpoint


def snapshot(step: int, base: int | None = None) -> Snapshot:
    """Of two weights, one of which the checkpoint of step ``base`` holds."""
    name = checkpoint_name(step)
    plan = CheckpointPlan(name, {"w": name, "v": checkpoint_name(base or step)}, since_full=int(base is not None))
    pieces = {key: Piece(torch.full((2,), float(step)), [0]) for key in plan.written}
    return Snapshot(step, plan, {"weights": pieces, "optimizer": {}}, set(), {"state.json": "{}", "config.yaml": ""})


def write(directory: Path, taken: Snapshot, keep: int = 0) -> str | None:
    return write_checkpoint(taken, directory, keep, group=None)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_written_is_complete_and_names_what_it_depends_on(tmp_path: Path) -> None:
    assert write(tmp_path, snapshot(1)) is None and write(tmp_path, snapshot(2, base=1)) is None
    assert names(tmp_path) == ["step_00000001", "step_00000002"], "nothing is left of the writing"
    later = tmp_path / checkpoint_name(2)
    assert verify(later) is None and read_dependencies(later) == [checkpoint_name(1)]
    tensors = ShardedTensors(later / "weights")
    assert list(tensors) == ["w"] and tensors.read("w").tolist() == [2.0, 2.0]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    assert write(tmp_path, snapshot(1)) is None
    assert names(tmp_path) == [checkpoint_name(1)] and verify(tmp_path / checkpoint_name(1)) is None
    assert list(ShardedTensors(tmp_path / checkpoint_name(1) / "weights")) == ["v", "w"]


@pytest.mark.parametrize("at", ["_make_folders", "write_pieces", "write_manifest"])
def test_a_disk_that_refuses_leaves_the_earlier_ones_alone(at: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(protocol, at, side_effect=refusal):
        found = write(tmp_path, snapshot(2), keep=1)
    assert found == "the checkpoint of step 2 could not be written: rank 0: No space left on device"
    assert names(tmp_path) == [checkpoint_name(1)] and verify(tmp_path / checkpoint_name(1)) is None


def test_what_must_come_first_may_fail(tmp_path: Path) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    found = write_checkpoint(snapshot(1), tmp_path, 0, None, prepare=fail)
    assert found == "the checkpoint of step 1 could not be written: rank 0: MemoryError: no room"
    assert names(tmp_path) == []


def test_leftovers_go_and_what_was_to_be_replaced_returns(tmp_path: Path) -> None:
    """A kill may leave a partial directory, and the old one of a replacement, before or after the new one is there."""
    for step, suffix in ((1, "replaced"), (2, "replaced"), (3, "partial")):
        make_checkpoint(tmp_path, step).rename(tmp_path / f".{checkpoint_name(step)}.{suffix}")
    newer = make_checkpoint(tmp_path, 2)
    (newer / "state.json").write_text("newer")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [checkpoint_name(1), checkpoint_name(2)]
    assert verify(tmp_path / checkpoint_name(1)) is None and (newer / "state.json").read_text() == "newer"


def test_retention_does_not_count_what_lost_its_base(tmp_path: Path) -> None:
    """After a run was taken back to 4 and has other checkpoints from 5 on, but none of step 6."""
    make_checkpoint(tmp_path, 4)
    make_checkpoint(tmp_path, 5, words="of the old history, of step")
    make_checkpoint(tmp_path, 6, depends_on=[4, 5])
    assert write(tmp_path, snapshot(5)) is None
    assert write(tmp_path, snapshot(7, base=5), keep=2) is None
    assert names(tmp_path) == [checkpoint_name(5), checkpoint_name(7)]
    assert verify(tmp_path / checkpoint_name(7)) is None


def test_a_base_that_is_gone_is_told(tmp_path: Path) -> None:
    assert "could not be written: rank 0: No such file" in str(write(tmp_path, snapshot(2, base=1)))
    assert names(tmp_path) == []


def test_retention_keeps_bases_and_later_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, depends_on=[10])
    make_checkpoint(tmp_path, 30)
    make_checkpoint(tmp_path, 40, depends_on=[10, 30])
    newest = make_checkpoint(tmp_path, 50, depends_on=[30])
    later = make_checkpoint(tmp_path, 90)
    remove_old(tmp_path, newest, keep=2)
    kept = [path.name for path in list_checkpoints(tmp_path)]
    assert kept == [checkpoint_name(step) for step in (90, 50, 40, 30, 10)], "10 and 30 are needed, 20 is not"
    assert verify(later) is None and verify(newest) is None
    remove_old(tmp_path, newest, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (90, 50, 30)]
