"""What is proposed where a plan does not fit."""

from __future__ import annotations

from lisa_dist.config.loading import load
from lisa_dist.planning.changes import single_changes


def test_machines_that_a_fixed_number_of_shards_rules_out_are_not_proposed() -> None:
    keys = ["model.path=a/model", "data.path=rows.json", "parallel.nproc_per_node=2"]
    assert ["parallel.nodes=2"] in single_changes(load(keys))
    fixed = single_changes(load([*keys, "parallel.shard=2"]))
    assert fixed and ["parallel.nodes=2"] not in fixed
