"""A run saved on some number of ranks goes on with another, on the same global batches."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.config import Config, UserError
from tests.support.ranks import run_on_ranks
from tests.support.runs import STEPS, Kill, make_config, metrics, resuming, train, train_here
from tests.support.tiny import read_summary

LAST_SAVED = 5


@dataclass(frozen=True)
class Placement:
    """Where the bytes of a run lie."""

    ranks: int
    replicate: int = 1
    offload: str = "none"


SAVED = {"plain": Placement(4), "hybrid": Placement(4, replicate=2, offload="all")}


def exact_config(run_dir: Path, placement: Placement) -> Config:
    """fp32 throughout and no dropout, so that only the order of sums depends on the number of ranks."""
    precision = ["precision.frozen=float32", "precision.compute=float32", "optimizer.lr=0.001"]
    placed = [f"parallel.replicate={placement.replicate}", f"parallel.offload={placement.offload}"]
    return make_config(run_dir, *precision, *placed, f"checkpoint.every={LAST_SAVED}", dropout=0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on four ranks, sharded over all and replicated, cut short after step 5; and a whole one on one rank."""
    directories = {name: tmp_path_factory.mktemp(name) for name in (*SAVED, "whole")}
    train(1, exact_config(directories["whole"], Placement(1)))
    for name, placement in SAVED.items():
        config = exact_config(directories[name], placement)
        assert set(run_on_ranks(4, train_here, config, Kill("before", LAST_SAVED + 1))) == {None}
    return directories


def figures(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if key in row]


def go_on(source: str, placements: list[Placement], saved: dict[str, Path], run_dir: Path) -> None:
    """Go on from step 5, a few steps in each placement, and compare with the run that was never cut short."""
    shutil.copytree(saved[source], run_dir)
    for number, placement in enumerate(placements, start=1):
        config = resuming(exact_config(run_dir, placement))
        if number < len(placements):
            config.checkpoint.every = LAST_SAVED + 2 * number
            kill = Kill("before", config.checkpoint.every + 1)
            assert set(run_on_ranks(placement.ranks, train_here, config, kill)) == {None}
        else:
            train(placement.ranks, config)
    assert len(read_summary(run_dir)["resumed_from"]) == len(placements)
    rows, expected = metrics(run_dir), metrics(saved["whole"])
    assert figures(rows, "step") == figures(expected, "step")
    assert figures(rows, "tokens") == figures(expected, "tokens"), "other global batches"
    assert figures(rows, "active_layers") == figures(expected, "active_layers")
    assert figures(rows, "loss") == pytest.approx(figures(expected, "loss"), rel=1e-4)
    assert figures(rows, "grad_norm") == pytest.approx(figures(expected, "grad_norm"), rel=1e-3)
    assert len(figures(rows, "loss")) == STEPS


@pytest.mark.parametrize(
    ("source", "placements"),
    [
        ("plain", [Placement(2, offload="frozen"), Placement(1, offload="all")]),
        ("plain", [Placement(3), Placement(4, replicate=2, offload="all")]),
        ("hybrid", [Placement(4)]),
        ("hybrid", [Placement(2, offload="frozen"), Placement(2)]),
    ],
    ids=["4 to 2 to 1", "4 to 3 to 2 x 2", "2 x 2 to 4", "2 x 2 to 2"],
)
def test_other_placements_go_on(
    source: str, placements: list[Placement], saved: dict[str, Path], tmp_path: Path
) -> None:
    go_on(source, placements, saved, tmp_path / "run")


@pytest.mark.soak
def test_eight_ranks_go_on(saved: dict[str, Path], tmp_path: Path) -> None:
    """On more ranks than saved it: no ordinary test, because eight ranks take long to start on two cores."""
    go_on("plain", [Placement(8), Placement(8, replicate=2, offload="frozen")], saved, tmp_path / "run")


def test_a_fresh_start_wants_whole_micro_batches(tmp_path: Path) -> None:
    for message in run_on_ranks(3, refusal, exact_config(tmp_path, Placement(3))):
        assert message.startswith("train.global_batch_size=8: must be a multiple")


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    return str(caught.value)
