"""Masters, moments and gradients sharded over all ranks of a replicate x shard mesh, against one replica's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_dist.config import UserError
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.loading import load
from lisa_dist.config.optimization import PARTS
from lisa_dist.method.module import TrainModule, begin_period, count_persistent_bytes, probe
from lisa_dist.planning.changes import single_changes
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.training.step import accumulate_gradients
from tests.support import planned, runs
from tests.support.ranks import run_on_ranks
from tests.support.small_training import PERIOD, build_and_load, make_config, make_global_batches, train_on_rank

RANKS, REPLICAS = 4, 2
BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}
WORLD = {"replicate": REPLICAS, "optimizer_shard": "world"}


@pytest.mark.parametrize(
    "update", ["full_rank", *(pytest.param(name, marks=pytest.mark.soak) for name in ("lora", "lora_fa"))]
)
def test_training_equals_that_with_masters_on_every_replica(update: str) -> None:
    results = []
    for optimizer_shard in ("replica", "world"):
        parallel = WORLD | {"optimizer_shard": optimizer_shard}
        config = make_config(parallel=parallel, precision=BF16)
        config.model.architecture["num_hidden_layers"] = 3
        config.update = load([f"update={update}"]).update
        results.append(run_on_ranks(RANKS, train_on_rank, config, PERIOD + 1, 2 * RANKS))
    replica, world = results[0][0], results[1][0]
    assert world["losses"] == pytest.approx(replica["losses"], rel=1e-4)
    for name, parameter in world["final"].items():
        expected = replica["final"][name]
        assert (parameter - expected).norm() <= 1e-4 * expected.norm(), name
    for other in results[1][1:]:
        assert all(torch.equal(parameter, world["final"][name]) for name, parameter in other["final"].items())
    assert all(dtypes == {torch.float32} for dtypes in world["reduce_dtypes"])


def count_over_periods(parallel: dict[str, Any], state_on_freeze: str) -> list[dict[str, Any]]:
    """Bytes and elements of this rank after each switch, and after gradients were accumulated. Runs on every rank."""
    config = make_config(parallel=parallel, precision=BF16, optimizer={"state_on_freeze": state_on_freeze})
    config.model.architecture["num_hidden_layers"] = 3
    train_module = build_and_load(config)
    seen = []
    for period, micro_batches in enumerate(make_global_batches(2, RANKS)):
        begin_period(train_module, period)
        accumulate_gradients(train_module, micro_batches[distributed.rank() :: RANKS])
        assert all(p.grad is None for p in train_module.store.module.parameters())
        seen.append({"bytes": count_persistent_bytes(train_module), **count_elements(train_module)})
        train_module.optimizer.step(dict.fromkeys(PARTS, 1e-3))
        assert shards_are_rounded_masters(train_module)
    return seen


def count_elements(train_module: TrainModule) -> dict[str, int]:
    """Elements of this rank's shards, of those that are frozen, and of its own rows of the others."""
    store, trained = train_module.store, train_module.optimizer.trained
    return {
        "frozen": sum(local_shard(store.parameter(name)).numel() for name in store.names if name not in trained),
        "active": sum(local_shard(store.parameter(name)).numel() for name in trained),
        "own": sum(local_shard(entry.stepped).numel() for entry in trained.values()),
    }


def shards_are_rounded_masters(train_module: TrainModule) -> bool:
    """Whether each shard holds the masters of its rows, its own and other replicas', rounded. Collective."""
    return all(
        torch.equal(train_module.store.parameter(name).full_tensor(), master.detach().full_tensor().bfloat16())  # type: ignore
        for name, master in train_module.optimizer.parameters.items()
    )


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(WORLD, id="on the device"),
        pytest.param(WORLD | {"offload": "frozen"}, id="offloaded", marks=pytest.mark.soak),
    ],
)
def test_bytes_obey_the_law(parallel: dict[str, Any]) -> None:
    ranks = run_on_ranks(RANKS, count_over_periods, parallel, "offload")
    for rows in ranks:
        for row in rows:
            row["bytes"].pop("offloaded_optimizer_state", None)
            assert row["bytes"] == {
                "frozen_parameters": 2 * row["frozen"],
                "active_parameters": 2 * row["active"],
                "masters": 4 * row["own"],
                "gradients": 4 * row["own"],
                "optimizer_state": 8 * row["own"],
            }
    for rows in zip(*ranks):  # every row of what trains is some rank's own, and no row is two ranks'
        assert sum(row["own"] for row in rows) == sum(row["active"] for row in rows) / REPLICAS


def test_a_plan_knows_the_bytes_and_the_gather() -> None:
    config = planned.make_config("llama", "full, two micro-batches")
    config.parallel = dataclasses.replace(config.parallel, nproc_per_node=str(RANKS), replicate=REPLICAS)
    config.train.global_batch_size = 2 * RANKS
    plain = simulate(config)
    config.parallel.optimizer_shard = "world"
    counted, peak = run_on_ranks(RANKS, planned.measure, config)[0]
    foretold = simulate(config)
    assert foretold.persistent_bytes == counted
    assert foretold.peak_bytes == pytest.approx(peak, rel=0.1)
    # Of the sums of gradients none is left from the groups before: the embeddings' backward comes last.
    saved = sum(plain.persistent_bytes.values()) - sum(foretold.persistent_bytes.values())
    assert plain.peaks["backward of embeddings"] - foretold.peaks["backward of embeddings"] > 0.75 * saved
    gathered = foretold.work.sent["all_gather"] - plain.work.sent["all_gather"]
    slices = foretold.persistent_bytes["masters"] // 2  # in bf16
    assert gathered == pytest.approx(slices * (REPLICAS - 1), rel=0.01)  # padding of rows that do not divide


def test_a_run_goes_on_exactly_and_with_masters_on_every_replica(tmp_path: Path) -> None:
    short = [f"train.max_steps={runs.PERIOD + 1}", "train.global_batch_size=4", "train.eval_batches=1"]
    short += ["checkpoint.keep=0", "model.architecture.num_hidden_layers=3"]
    keys = [*short, f"parallel.replicate={REPLICAS}", "parallel.optimizer_shard=world"]
    whole, cut, other = (tmp_path / name for name in ("whole", "cut", "other"))
    runs.train(RANKS, runs.make_config(whole, *keys))
    for name in (cut, other):
        runs.cut_back(whole, name, 1)
    runs.train(RANKS, runs.resuming(runs.make_config(cut, *keys)))
    runs.assert_same_run(cut, whole)
    runs.train(2, runs.resuming(runs.make_config(other, *short)))
    found, expected = ([row["loss"] for row in runs.metrics(run) if "loss" in row] for run in (other, whole))
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(expected[1:], rel=0.01)


def test_a_plan_proposes_it_where_it_can_be() -> None:
    config = load(["model=llama2_7b", "method=lisa", f"parallel.nproc_per_node={RANKS}"])
    change, offload = ["parallel.optimizer_shard=world"], ["parallel.offload=all"]
    assert change not in single_changes(config)
    config.parallel.replicate = REPLICAS
    assert change in single_changes(config) and offload in single_changes(config)
    config.parallel.optimizer_shard = "world"
    assert offload not in single_changes(config)


def probe_twice(optimizer_shard: str) -> list[float]:
    """Gradient norms before the first switch and with active blocks. Runs on every rank."""
    config = make_config(parallel=WORLD | {"optimizer_shard": optimizer_shard}, precision=BF16)
    config.model.architecture["num_hidden_layers"] = 3
    config.sampler = load(["sampler=gradient"]).sampler
    config.sampler.active_layers = 2
    train_module = build_and_load(config)

    def coming(count: int) -> list[dict[str, torch.Tensor]]:
        return make_global_batches(1)[0][distributed.rank() :: RANKS][:count]

    begin_period(train_module, 0, coming)
    norms = probe(train_module, train_module.sampler.sampler.request(), coming)
    assert not train_module.optimizer.gradients()
    return norms


def test_a_probe_sees_the_gradients() -> None:
    norms = [run_on_ranks(RANKS, probe_twice, optimizer_shard)[0] for optimizer_shard in ("replica", "world")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6) and min(norms[0]) > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["update=low_rank"], "use parallel.optimizer_shard=replica"),
        (["optimizer.in_backward=true"], "needs optimizer.in_backward=false"),
        (["parallel.offload=all"], "parallel.offload must be none or frozen"),
    ],
)
def test_what_has_no_masters_to_shard_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_combinations(load(["parallel.replicate=2", "parallel.optimizer_shard=world", *overrides]))
