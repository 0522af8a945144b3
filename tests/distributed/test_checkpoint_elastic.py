"""A run saved on some number of ranks goes on with another, on the same global batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.config import Config
from tests.support.ranks import run_on_ranks
from tests.support.runs import Kill, make_config, metrics, refusal, resuming, train, train_here
from tests.support.tiny import read_summary


@dataclass(frozen=True)
class Placement:
    """Where the bytes of a run lie."""

    ranks: int
    replicate: int = 1
    offload: str = "none"


# More ranks and fewer, plain and hybrid sharding, each kind of offload, the resident store in between.
PLACEMENTS = [Placement(4, replicate=2, offload="all"), Placement(1), Placement(3, offload="frozen")]
# Plain and hybrid sharding one after the other; and each kind of offload after each other one.
MORE = [
    Placement(4, replicate=2, offload="all"),
    Placement(4),
    Placement(2, offload="frozen"),
    Placement(1, offload="all"),
    Placement(3, offload="frozen"),
    Placement(4, replicate=2),
    Placement(2, offload="all"),
]
ON_EIGHT = [Placement(4), Placement(8), Placement(8, replicate=2, offload="frozen"), Placement(2)]


def exact_config(run_dir: Path, placement: Placement, steps: int) -> Config:
    """fp32 throughout and no dropout, so that only the order of sums depends on the number of ranks."""
    settings = ["precision.frozen=float32", "precision.compute=float32", "optimizer.lr=0.001"]
    settings += [f"parallel.replicate={placement.replicate}", f"parallel.offload={placement.offload}"]
    settings += [f"train.max_steps={steps}", "train.global_batch_size=8"]
    return make_config(run_dir, *settings, dropout=0.0)


def figures(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize(
    "placements",
    [PLACEMENTS, pytest.param(MORE, marks=pytest.mark.soak), pytest.param(ON_EIGHT, marks=pytest.mark.soak)],
    ids=["up to 4", "more", "8"],
)
def test_other_placements_go_on(placements: list[Placement], tmp_path: Path) -> None:
    """Each placement makes one step and is cut short; all steps are those of a run that stayed on one rank.

    Of replicas each weight is written once.
    """
    steps, run_dir = len(placements), tmp_path / "run"
    for done, placement in enumerate(placements):
        config = exact_config(run_dir, placement, steps)
        config = resuming(config) if done else config
        ended = None if done + 1 < steps else 0
        assert set(run_on_ranks(placement.ranks, train_here, config, Kill("before", done + 2))) == {ended}
        written = (run_dir / "checkpoints" / checkpoint_name(done + 1)).glob("weights/*.safetensors")
        sizes = [path.stat().st_size for path in written]
        assert len(sizes) == placement.ranks
        shards = placement.ranks // placement.replicate
        assert sum(size > 1000 for size in sizes) == shards, "the second replica's files are empty"
    assert read_summary(run_dir)["resumed_from"] == list(range(1, steps))
    train(1, exact_config(tmp_path / "whole", Placement(1), steps))
    rows, expected = metrics(run_dir), metrics(tmp_path / "whole")
    assert figures(rows, "step") == figures(expected, "step")
    assert figures(rows, "tokens") == figures(expected, "tokens"), "other global batches"
    assert figures(rows, "active_layers") == figures(expected, "active_layers")
    assert figures(rows, "loss") == pytest.approx(figures(expected, "loss"), rel=1e-4)
    assert figures(rows, "grad_norm") == pytest.approx(figures(expected, "grad_norm"), rel=1e-3)
    assert len(figures(rows, "loss")) == steps


def test_a_fresh_start_wants_whole_micro_batches(tmp_path: Path) -> None:
    for message in run_on_ranks(3, refusal, exact_config(tmp_path, Placement(3), steps=1)):
        assert message.startswith("train.global_batch_size=8: must be a multiple")
