"""Blocks compiled one by one: the same training, and two graphs however often the active set changes."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from lisa_dist.method.module import begin_period, build_train_module, load_initial_weights
from lisa_dist.training.loop import train_step
from tests.support.ranks import run_on_ranks
from tests.support.small_training import make_config


def train(compiled: bool) -> dict[str, Any]:
    """Train with a fresh compiler. Runs on every rank."""
    torch._dynamo.reset()
    counters.clear()
    # The graphs are what is tested here; making machine code of them takes most of the time.
    without_code = functools.partial(torch.nn.Module.compile, backend="aot_eager")
    with mock.patch.object(torch.nn.Module, "compile", lambda block, **settings: without_code(block, **settings)):
        return train_four_periods(compiled)


def train_four_periods(compiled: bool) -> dict[str, Any]:
    """Four periods of one step, rows of one length."""
    config = make_config(parallel={"compile": compiled}, sampler={"period": 1, "active_layers": 1})
    train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device("cpu"))
    ids = torch.arange(16)[None] % 127
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16)[None]}
    losses, drawn = [], []
    for period in range(4):
        begin_period(train_module, period)
        drawn.append(tuple(train_module.active.blocks))
        losses.append(train_step(train_module, [batch], period, 4).loss)
    return {"losses": losses, "graphs": counters["stats"]["unique_graphs"], "sets": len(set(drawn))}


def test_two_graphs_serve_every_active_set() -> None:
    plain = run_on_ranks(1, train, False)[0]
    compiled = run_on_ranks(1, train, True)[0]
    assert plain["graphs"] == 0 and plain["sets"] > 2
    assert compiled["graphs"] == 2  # a block that trains, and one that is frozen
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)
