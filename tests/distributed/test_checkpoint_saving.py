"""Ways to write checkpoints, on real ranks: in the background, only what changed, on disks that fail."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh

from lisa_dist.checkpoint.background import CheckpointError
from lisa_dist.checkpoint.manifest import checkpoint_name, list_checkpoints, verify
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.shards import Piece, ShardedTensors, WrittenFile, write_pieces
from lisa_dist.config import Config
from lisa_dist.runtime import distributed
from lisa_dist.telemetry.records import read_rows
from tests.support import runs
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    PERIOD,
    STEPS,
    Kill,
    assert_same_run,
    refusal,
    resuming,
    step_written,
    tensors_of,
    train,
    train_here,
)
from tests.support.tiny import read_summary

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


def make_config(run_dir: Path, *overrides: str) -> Config:
    """A run that trains one block at a time, with two micro-batches a step on each of two ranks."""
    return runs.make_config(run_dir, "sampler.active_layers=1", *overrides)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that keeps every checkpoint, full and written at once."""
    run_dir = tmp_path_factory.mktemp("plain")
    train(2, make_config(run_dir, "checkpoint.keep=0"))
    return run_dir


def copy_up_to(step: int, plain: Path, run_dir: Path) -> None:
    """Copy the plain run as it would lie there if it had been cut short after ``step``."""
    later = [checkpoint_name(number) for number in range(step + 1, STEPS + 1)]
    shutil.copytree(plain, run_dir, ignore=shutil.ignore_patterns(*later))


def outcomes_of_a_slow_rank() -> list[int]:
    """What ranks gather of an action that takes rank 1 longer than the group's time-out. Runs on every rank."""

    def write() -> int:
        time.sleep(6 * distributed.rank())
        return distributed.rank()

    return distributed.gather_outcomes(write, distributed.thread_group(5))


def wait_for_a_lost_rank(noticed: Path) -> None:
    """Rank 1 takes no part until rank 0 has noticed that. Runs on every rank."""
    group = distributed.thread_group(5)
    if distributed.rank() == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            distributed.gather_outcomes(lambda: 0, group)
        noticed.touch()
    while not noticed.exists():
        time.sleep(0.02)


def test_a_slow_disk_is_waited_for_and_a_lost_rank_is_not(tmp_path: Path) -> None:
    assert run_on_ranks(2, outcomes_of_a_slow_rank) == [[0, 1]] * 2
    run_on_ranks(2, wait_for_a_lost_rank, tmp_path / "noticed")


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / checkpoint_name(step)


def own_weights(directory: Path) -> dict[str, int]:
    """The weights that a checkpoint's own files hold, and their bytes."""
    tensors = ShardedTensors(directory / "weights")
    return {name: tensors.read(name).nbytes for name in tensors}


def test_in_the_background_only_what_changed(plain: Path, tmp_path: Path) -> None:
    """Between full checkpoints lie those weights alone that trained since the one before, as they were at that step."""
    settings = ["checkpoint.keep=0", "checkpoint.async=true", "checkpoint.full_every=4"]
    train(2, make_config(tmp_path, *settings), Kill("inside", 4))
    assert_same_run(tmp_path, plain)
    blocks = {row["step"]: row["active_layers"][0] for row in read_rows(tmp_path / "layers.jsonl")}
    assert blocks[1] != blocks[3], "a seed whose draws differ is needed for this test"
    everything = own_weights(checkpoint(plain, 1))
    for step in range(1, STEPS + 1):
        assert verify(checkpoint(tmp_path, step)) is None
        found, expected = tensors_of(checkpoint(tmp_path, step)), tensors_of(checkpoint(plain, step))
        assert all(torch.equal(found[name], expected[name]) for name in expected), f"step {step} was staged too late"
        written = own_weights(checkpoint(tmp_path, step))
        if step in (1, 5):  # every fourth, counted on over the resume
            assert written.keys() == everything.keys()
            continue
        # The block that trains now, and at the first step of a period the one that was frozen just before.
        now = (step - 1) // PERIOD * PERIOD + 1
        active = {blocks[now]} | ({blocks[now - PERIOD]} if step == now else set())
        inside = {name for name in everything if ".layers." in name}
        changed = {name for name in inside if int(name.split(".layers.")[1].split(".")[0]) in active}
        assert written.keys() == changed | (everything.keys() - inside)


def test_a_chain_is_kept_and_restored(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    copy_up_to(4, plain, run_dir)
    config = make_config(run_dir, "checkpoint.keep=1", "checkpoint.full_every=100")
    train(2, resuming(config), Kill("before", STEPS))
    assert_same_run(run_dir, plain)
    kept = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    assert kept[0] == checkpoint_name(STEPS) and checkpoint_name(4) in kept, "the base is needed"
    needed = json.loads((checkpoint(run_dir, STEPS) / "manifest.json").read_text())["depends_on"]
    assert sorted(kept[1:]) == sorted(needed)


def test_the_only_checkpoint_survives_a_kill_while_the_next_is_written(plain: Path, tmp_path: Path) -> None:
    copy_up_to(4, plain, tmp_path / "run")
    config = resuming(make_config(tmp_path / "run", "checkpoint.keep=1"))
    train(2, config, Kill("saved", 6))
    assert_same_run(tmp_path / "run", plain)
    assert read_summary(tmp_path / "run")["resumed_from"] == [4, 5]


def test_a_damaged_newest_falls_back_and_is_written_anew(plain: Path, tmp_path: Path) -> None:
    copy_up_to(5, plain, tmp_path / "run")
    shard = checkpoint(tmp_path / "run", 5) / "weights" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    train(2, resuming(make_config(tmp_path / "run", "checkpoint.keep=3")))
    assert_same_run(tmp_path / "run", plain)
    assert read_summary(tmp_path / "run")["resumed_from"] == [4]
    assert verify(checkpoint(tmp_path / "run", 5)) is None


def test_never_silently_from_scratch(plain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    copy_up_to(2, plain, run_dir)
    (checkpoint(run_dir, 1) / "manifest.json").unlink()
    (checkpoint(run_dir, 2) / "state.json").write_text("{}")
    rows = (run_dir / "metrics.jsonl").read_text()
    for message in run_on_ranks(2, refusal, resuming(make_config(run_dir, "checkpoint.keep=0"))):
        assert message.startswith("checkpoint.resume=auto: every checkpoint in ")
        assert "step_00000001/manifest.json is missing" in message and "step_00000002/state.json has 2 bytes" in message
    assert (run_dir / "metrics.jsonl").read_text() == rows, "nothing is written over"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampler=sweep", "was written with sampler.name=uniform, this run has sampler.name=sweep"),
        ("sampler.period=4", "was written with sampler.period=2, this run has sampler.period=4"),
        ("optimizer=lion", "was written with optimizer.name=adamw, this run has optimizer.name=lion"),
        ("model.architecture.hidden_size=24", "hidden_size=18 then, 24 now"),
    ],
)
def test_a_checkpoint_of_another_run(override: str, told: str, plain: Path) -> None:
    for message in run_on_ranks(2, refusal, resuming(make_config(plain, "checkpoint.keep=0", override))):
        assert told in message


def test_no_pickle_and_dcp_reads_it(plain: Path) -> None:
    newest = list_checkpoints(plain / "checkpoints")[0]
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                assert len(list(opened.keys())) > 0
    expected = tensors_of(newest)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = {name: torch.empty_like(expected[f"weights/{name}"])}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(newest / "weights")), no_dist=True)
    assert torch.equal(whole[name], expected[f"weights/{name}"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system for two checkpoints, mounted where the checkpoints of a run in ``tmp_path/run`` go."""
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def train_and_tell(config: Config) -> tuple[str, list[int]]:
    """Train; how it ended, and the steps made until then."""
    try:
        ended = str(train_here(config))
    except CheckpointError as error:
        ended = str(error)
    return ended, [row["step"] for row in read_rows(Path(str(config.run.dir)) / "metrics.jsonl") if "loss" in row]


@AS_ROOT
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk(background: str, small_disk: Path) -> None:
    run_dir = small_disk.parent
    config = make_config(run_dir, "checkpoint.keep=0", f"checkpoint.async={background}")
    results = run_on_ranks(2, train_and_tell, config)
    for ended, _ in results:
        assert ended.startswith("the checkpoint of step ") and "No space left on device" in ended
    failed = int(results[0][0].split("step ")[1].split(" ")[0])
    assert 1 < failed < STEPS - 1 and results[0][1][-1] in (
        (failed,) if background == "false" else (failed + 1, failed + 2)
    )
    found = list_checkpoints(small_disk)
    assert [path.name for path in found] == [checkpoint_name(step) for step in range(failed - 1, 0, -1)]
    assert verify(found[0]) is None, "the one before is intact"
    assert not list(small_disk.glob(".step*")), "what was begun is removed"


@AS_ROOT
@pytest.mark.parametrize("in_background", ["true", "false"])
def test_going_on_without_a_disk(in_background: str, small_disk: Path) -> None:
    """With on_error=warn the run makes every step; only the last checkpoint's failure ends it."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = make_config(small_disk.parent, f"checkpoint.async={in_background}", "checkpoint.on_error=warn")
    for ended, steps in run_on_ranks(2, train_and_tell, config):
        assert ended.startswith(f"the checkpoint of step {STEPS} could not be written: rank 0: Read-only file system")
        assert steps == list(range(1, STEPS + 1))
    log = (small_disk.parent / "logs" / "rank_0.log").read_text()
    assert "the checkpoint of step 1 could not be written" in log and "the run goes on without it" in log


def write_while_training(config: Config) -> list[tuple[str, int]]:
    """Train where every write in the background waits until a step was made after it; what happened, in order."""
    must_stop, finish = CheckpointSaver.must_stop, CheckpointSaver.finish
    gates = {step: threading.Event() for step in range(1, STEPS + 1)}
    begun: set[int] = set()  # checkpoints after which a step was begun
    events: list[tuple[str, int]] = []

    def held_write(pieces: dict[str, Piece], file: Path) -> WrittenFile:
        step = step_written(file)
        assert gates[step].wait(60)
        if file.parent.name == "weights":
            events.append(("written", step))
        return write_pieces(pieces, file)

    def open_gate(saver: CheckpointSaver, event: str) -> None:
        writing = saver.writer.writing
        if writing is not None and not gates[writing.step].is_set():
            events.append((event, writing.step))
            gates[writing.step].set()

    def at_a_step(saver: CheckpointSaver) -> bool:
        writing = saver.writer.writing
        if writing is not None and writing.step in begun:
            open_gate(saver, "a step was made before it was written")
        elif writing is not None:
            begun.add(writing.step)
        return must_stop(saver)

    def at_the_end(saver: CheckpointSaver, stop_on_error: bool | None = None) -> None:
        if stop_on_error:
            open_gate(saver, "the run ended before it was written")
        finish(saver, stop_on_error)

    with (
        mock.patch.multiple(CheckpointSaver, must_stop=at_a_step, finish=at_the_end),
        mock.patch("lisa_dist.checkpoint.protocol.write_pieces", held_write),
    ):
        train_here(config)
    return events


@pytest.mark.parametrize("frozen", ["bfloat16", "float32"])
def test_training_goes_on_while_it_writes(frozen: str, plain: Path, tmp_path: Path) -> None:
    """Blocks are switched and trained before they are written, yet written is what they were when they were saved."""
    settings = ["checkpoint.keep=0", f"checkpoint.every={PERIOD}", f"precision.frozen={frozen}"]
    config = make_config(tmp_path / "run", *settings, "checkpoint.async=true")
    for events in run_on_ranks(2, write_while_training, config):
        expected = [("a step was made before it was written", 2), ("written", 2)]
        expected += [("a step was made before it was written", 4), ("written", 4)]
        expected += [("the run ended before it was written", 6), ("written", 6)]
        assert events == expected
    reference = plain
    if frozen == "float32":  # a thaw keeps the storage
        reference = tmp_path / "reference"
        train(2, make_config(reference, *settings))
    for step in (2, 4):
        found, whole = tensors_of(checkpoint(tmp_path / "run", step)), tensors_of(checkpoint(reference, step))
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def wait_for_a_slow_rank() -> list[float]:
    """Meet a rank that is later than the usual second; the time-outs of all groups, in seconds, afterwards."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    with distributed.longer_timeout(1, mesh):
        if distributed.rank() == 1:
            time.sleep(2)
        distributed.barrier()
    groups = [dist.group.WORLD, *mesh.get_all_groups()]
    after = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=120))  # as the pool had it
    return after


def test_collectives_wait_for_disks_and_compilers_and_then_no_longer_than_the_key_says() -> None:
    assert run_on_ranks(2, wait_for_a_slow_rank) == [[1, 1, 1]] * 2
