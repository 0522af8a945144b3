"""A run saved on some number of ranks goes on with another, on the same global batches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.config import Config, UserError
from tests.checkpoint.runs import STEPS, Kill, make_config, metrics, resuming, train, train_here
from tests.ranks import run_on_ranks

LAST_SAVED = 5


def exact_config(run_dir: Path, *overrides: str) -> Config:
    """fp32 throughout and no dropout, so that only the order of sums depends on the number of ranks."""
    precision = ["precision.frozen=float32", "precision.compute=float32", "optimizer.lr=0.001"]
    return make_config(run_dir, *precision, *overrides, dropout=0.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on four ranks, sharded over all and replicated, cut short after step 5; and one that went on."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("plain", "hybrid", "whole")}
    train(4, exact_config(directories["whole"]))
    for name, replicate in (("plain", 1), ("hybrid", 2)):
        config = exact_config(directories[name], f"parallel.replicate={replicate}")
        assert set(run_on_ranks(4, train_here, config, Kill("before", LAST_SAVED + 1))) == {None}
    return directories


def figures(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows if key in row]


@pytest.mark.parametrize(
    ("source", "world_size", "replicate"),
    [("plain", 1, 1), ("plain", 2, 1), ("plain", 3, 1), ("plain", 4, 2), ("hybrid", 4, 1), ("hybrid", 2, 1)],
)
def test_other_ranks_go_on(
    source: str, world_size: int, replicate: int, saved: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(saved[source], run_dir)
    config = exact_config(run_dir, f"parallel.replicate={replicate}")
    train(world_size, resuming(config))
    rows, expected = metrics(run_dir), metrics(saved["whole"])
    assert figures(rows, "step") == figures(expected, "step")
    assert figures(rows, "tokens") == figures(expected, "tokens"), "other global batches"
    assert figures(rows, "active_layers") == figures(expected, "active_layers")
    assert figures(rows, "loss") == pytest.approx(figures(expected, "loss"), rel=1e-4)
    assert figures(rows, "grad_norm") == pytest.approx(figures(expected, "grad_norm"), rel=1e-3)
    assert len(figures(rows, "loss")) == STEPS


def test_a_fresh_start_wants_whole_micro_batches(tmp_path: Path) -> None:
    for message in run_on_ranks(3, refusal, exact_config(tmp_path)):
        assert message.startswith("train.global_batch_size=8: must be a multiple")


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        train_here(config)
    return str(caught.value)
