"""The interface of parameter stores: everything that drives one drives a store without FSDP2 too, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.method.module import (
    TrainModule,
    begin_period,
    build_train_module,
    count_persistent_bytes,
    load_initial_weights,
)
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding import build_store
from lisa_dist.training.loop import accumulate_gradients, train_step
from tests.support.ranks import run_on_ranks
from tests.support.resident_store import ResidentStore
from tests.support.small_training import make_config, make_global_batches

CPU = torch.device("cpu")
PERIOD, STEPS, SAVED = 2, 6, 3
BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}
STORES = {"sharded": build_store, "resident": ResidentStore}


def weights(train_module: TrainModule) -> dict[str, torch.Tensor]:
    return {name: local_shard(tensor).clone() for name, tensor in train_module.store.tensors().items()}


def run_steps(train_module: TrainModule, first: int, last: int, directory: Path | None = None) -> list[float]:
    """Make steps ``first`` up to ``last``, a checkpoint after step SAVED where there is a directory for it."""
    batches, losses = make_global_batches(STEPS), []
    for step in range(first, last):
        if step % PERIOD == 0:
            begin_period(train_module, step // PERIOD, lambda count: batches[0][:count])
        losses.append(train_step(train_module, batches[step], step, STEPS).loss)
        if directory is not None and step + 1 == SAVED:
            CheckpointSaver(train_module, directory, to_yaml(train_module.config)).save(Progress(step=SAVED))
    return losses


def drive(kind: str, method: str, precision: dict[str, str], tied: bool, directory: Path, other: Path | None) -> Any:
    """Train in a store, save there, and where another's checkpoint is, go on from it. Runs on one rank."""
    config = make_config(precision=precision, sampler={"period": PERIOD})
    config.model.architecture["tie_word_embeddings"] = tied
    config.update, config.sampler = (chosen := load([f"method={method}"])).update, chosen.sampler
    config.sampler.period = PERIOD
    with mock.patch("lisa_dist.method.module.build_store", STORES[kind]):
        train_module = build_train_module(config)
        load_initial_weights(train_module, CPU)
        losses = run_steps(train_module, 0, STEPS, directory)
        plain = [not isinstance(tensor, DTensor) for tensor in train_module.optimizer.moment_tensors().values()]
        assert all(plain) if kind == "resident" else not any(plain)
        result = {"losses": losses, "weights": weights(train_module)}
        if other is not None:
            again = build_train_module(config)
            restore_checkpoint(again, other / checkpoint_name(SAVED), CPU, data={})
            result |= {"resumed losses": run_steps(again, SAVED, STEPS), "resumed weights": weights(again)}
        return result


@pytest.mark.parametrize(
    ("method", "precision", "tied"),
    [("lisa", {}, True), ("grass", BF16, False), ("owlore", BF16, False), ("lora", BF16, False)],
)
def test_a_store_without_fsdp2_makes_the_same_numbers_and_checkpoints_go_both_ways(
    method: str, precision: dict[str, str], tied: bool, tmp_path: Path
) -> None:
    # Tied weights in bf16 would differ: their two gradients meet in bf16 under FSDP2, here in the masters' dtype.
    one, other = tmp_path / "sharded", tmp_path / "resident"
    sharded = run_on_ranks(1, drive, "sharded", method, precision, tied, one, None)[0]
    resident = run_on_ranks(1, drive, "resident", method, precision, tied, other, one)[0]
    back = run_on_ranks(1, drive, "sharded", method, precision, tied, tmp_path / "back", other)[0]
    assert resident["losses"] == sharded["losses"] and len(set(sharded["losses"])) == STEPS
    assert resident["resumed losses"] == back["resumed losses"] == sharded["losses"][SAVED:]
    for name, expected in sharded["weights"].items():
        for found in (resident["weights"], resident["resumed weights"], back["resumed weights"]):
            assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name


def count_bytes(kind: str) -> tuple[dict[str, int], int, int]:
    """Persistent bytes after a backward pass, and the parameters that are frozen and trained. Runs on one rank."""
    with mock.patch("lisa_dist.method.module.build_store", STORES[kind]):
        train_module = build_train_module(make_config(precision=BF16))
        load_initial_weights(train_module, CPU)
        begin_period(train_module, 0)
        accumulate_gradients(train_module, make_global_batches(1)[0][:2])
        store, trained = train_module.store, train_module.optimizer.trained
        total = sum(store.parameter(name).numel() for name in store.names)
        active = sum(store.parameter(name).numel() for name in trained)
        return count_persistent_bytes(train_module), total - active, active


def test_masters_that_lie_beside_what_computes_are_counted() -> None:
    counted, frozen, active = run_on_ranks(1, count_bytes, "resident")[0]
    assert counted == {
        "frozen_parameters": 2 * frozen,
        "active_parameters": 2 * active,
        "masters": 4 * active,
        "gradients": 4 * active,
        "optimizer_state": 8 * active,
    }
    plain, *_ = run_on_ranks(1, count_bytes, "sharded")[0]
    assert sum(plain.values()) == 2 * frozen + 16 * active
