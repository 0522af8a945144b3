"""The ranks as a grid of replicas and shards: what it refuses, whose micro-batches, and who adds up the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from datasets import Dataset

from lisa_dist.config import ParallelConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.data.sequences import Sequences
from lisa_dist.runtime import distributed
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.training.setup import make_batches
from tests.support.ranks import run_on_ranks


@pytest.mark.parametrize(
    ("ranks", "replicate", "shard", "message"),
    [
        (4, 3, "auto", r"parallel\.replicate=3: must divide the number of ranks, 4"),
        (2, 4, "auto", r"parallel\.replicate=4: must divide the number of ranks, 2"),
        (4, 2, "4", r"parallel\.shard=4: replicate x shard must equal the number of ranks, but 2 x 4 is not 4"),
        (4, 1, "2", r"parallel\.shard=2: .* but 1 x 2 is not 4"),
    ],
)
def test_shapes_that_the_ranks_do_not_make_up_are_refused(ranks: int, replicate: int, shard: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ParallelDims.of(ParallelConfig(replicate=replicate, shard=shard), ranks)


@pytest.mark.parametrize(("replicate", "shard"), [(0, 4), (2, 0), (2, 3), (-1, -4)])
def test_no_dimensions_are_built_that_do_not_fit(replicate: int, shard: int) -> None:
    with pytest.raises(UserError):
        ParallelDims(4, replicate=replicate, shard=shard)


@pytest.mark.parametrize(
    ("replicate", "shard", "axes", "words"),
    [
        (1, "auto", {"shard": 8}, "8 shard"),
        (2, "auto", {"replicate": 2, "shard": 4}, "2 replicate x 4 shard"),
        (8, "1", {"replicate": 8, "shard": 1}, "8 replicate x 1 shard"),
    ],
)
def test_auto_shards_over_what_replicas_leave(replicate: int, shard: str, axes: dict[str, int], words: str) -> None:
    dims = ParallelDims.of(ParallelConfig(replicate=replicate, shard=shard), 8)
    assert (dims.axes, str(dims), dims.data_ranks) == (axes, words, 8)


def test_batches_are_dealt_by_the_dimensions_and_not_by_the_processes() -> None:
    rows = [[token, token] for token in range(8)]
    sequences = Sequences(Dataset.from_dict({"input_ids": rows, "labels": rows, "length": [2] * 8}))
    config = load(["train.global_batch_size=8", "train.micro_batch_size=2"])
    batches = make_batches(config, ParallelDims(4, replicate=2, shard=2), sequences, 0)
    assert distributed.world_size() == 1 and len(batches.micro_batches(0)) == 1
    assert len(make_batches(config, ParallelDims(1, replicate=1, shard=1), sequences, 0).micro_batches(0)) == 4


def on_the_grid(replicate: int) -> dict[str, Any]:
    """What the dimensions say of this rank. Runs on every rank."""
    dims = ParallelDims.of(ParallelConfig(replicate=replicate))
    dims.mesh  # noqa: B018 (built where it is read first)
    made = len(dist.distributed_c10d._world.pg_map)
    ranks = dist.get_process_group_ranks(dims.loss_group)
    return {
        "mesh": dims.mesh.mesh.tolist(),
        "names": dims.mesh.mesh_dim_names,
        "data_rank": dims.data_rank,
        "loss_ranks": ranks,
        "sums": dims.all_reduce_sum([float(dims.data_rank), 0.1]),
        "plain_sums": distributed.all_reduce_sum([float(dims.data_rank), 0.1]),
        "groups_for_the_loss": len(dist.distributed_c10d._world.pg_map) - made,
    }


@pytest.mark.parametrize(("replicate", "mesh"), [(1, [0, 1, 2, 3]), (2, [[0, 1], [2, 3]])])
def test_the_loss_is_added_up_over_all_ranks_of_the_mesh(replicate: int, mesh: list[Any]) -> None:
    found = run_on_ranks(4, on_the_grid, replicate)
    for rank, one in enumerate(found):
        assert (one["mesh"], one["data_rank"]) == (mesh, rank)
        assert one["loss_ranks"] == np.ravel(mesh).tolist()
        assert one["sums"] == one["plain_sums"] == found[0]["sums"] and one["sums"][0] == 0 + 1 + 2 + 3
        assert one["groups_for_the_loss"] == 0, "torch made a group that it has"
    assert found[0]["names"] == (("shard",) if replicate == 1 else ("replicate", "shard"))


def test_one_process_needs_no_group_to_add_up() -> None:
    assert ParallelDims(1, replicate=1, shard=1).all_reduce_sum([1.5, 2.0]) == [1.5, 2.0]
