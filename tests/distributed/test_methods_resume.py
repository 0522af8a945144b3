"""Runs of every kind of update and of learning sampler, cut short and resumed, on as many ranks or on fewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.config import Config
from lisa_dist.method.module import build_train_module
from lisa_dist.telemetry.records import read_rows
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    PERIOD,
    Kill,
    assert_same_run,
    cut_back,
    final_tensors,
    make_config,
    resuming,
    train,
    train_here,
)

# With the number of ranks: on one the weights are in the resident store.
PAIRS = {
    "ist": (1, ["method=ist"]),
    "owlore": (2, ["method=owlore", "update.refresh_every=2", "sampler.threshold=2"]),
    "lion by bandit": (
        2, ["sampler=bandit", "optimizer=lion", "optimizer.lr=1e-3", "optimizer.state_on_freeze=offload"],
    ),
    "lora_fa by gradient": (1, ["method=lora_fa", "sampler=gradient", "sampler.probe_every=1"]),
}  # fmt: skip


def sampler_state(config: Config, checkpoint: Path) -> dict[str, Any]:
    """The sampler's state and the active blocks after loading a checkpoint. Runs on every rank."""
    train_module = build_train_module(config)
    restore_checkpoint(train_module, checkpoint, torch.device("cpu"), data={})
    return {"sampler": train_module.sampler.state_dict(), "active_layers": train_module.active.blocks}


@pytest.mark.parametrize("pair", sorted(PAIRS))
def test_a_resumed_run_equals_the_uninterrupted_one(pair: str, tmp_path: Path) -> None:
    ranks, chosen = PAIRS[pair]
    steps = f"train.max_steps={2 * PERIOD + 1}"
    whole, cut = (make_config(tmp_path / name, steps, "checkpoint.keep=0", *chosen) for name in ("whole", "cut"))
    train(ranks, whole)
    cut_back(tmp_path / "whole", tmp_path / "cut", PERIOD + 1)
    train(ranks, resuming(cut))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    scores = [row["scores"] for row in read_rows(tmp_path / "cut" / "layers.jsonl")]
    assert len(scores) == 3 and any(len(set(row)) > 1 for row in scores), "no probe had a result"
    # At another world size the sampler and the active set are those that were saved.
    newest = list_checkpoints(tmp_path / "cut" / "checkpoints")[0]
    saved = json.loads((newest / "state.json").read_text())
    assert run_on_ranks(3 - ranks, sampler_state, cut, newest)[0] == {
        key: saved[key] for key in ("sampler", "active_layers")
    }


@pytest.mark.parametrize("update", [pytest.param("lora", marks=pytest.mark.soak), "low_rank"])
def test_a_run_goes_on_with_fewer_ranks(update: str, tmp_path: Path) -> None:
    chosen = [f"update={update}", "sampler=sweep", "sampler.order=random"]
    exact = ["precision.frozen=float32", "precision.compute=float32"]
    whole, cut = (make_config(tmp_path / name, *chosen, *exact, dropout=0.0) for name in ("whole", "cut"))
    train(1, whole)
    assert run_on_ranks(2, train_here, cut, Kill("before", PERIOD + 2)) == [None, None]
    train(1, resuming(cut))
    rows, expected = (read_rows(tmp_path / name / "layers.jsonl") for name in ("cut", "whole"))
    assert [row["active_layers"] for row in rows] == [row["active_layers"] for row in expected]
    found, reference = final_tensors(tmp_path / "cut"), final_tensors(tmp_path / "whole")
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        if name.startswith("weights/"):
            assert (found[name].float() - tensor.float()).norm() <= 1e-3 * tensor.float().norm() + 1e-6, name
