"""Blocks compiled one by one: the same training, and two graphs whatever changes from step to step."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

from lisa_dist.method.module import begin_period, build_train_module, load_initial_weights
from lisa_dist.method.probes import mean_loss
from lisa_dist.training.step import train_step
from tests.support.ranks import run_on_ranks
from tests.support.small_training import ARCHITECTURE, build_and_load, make_config

ROWS = ((2, 16), (2, 8), (3, 24), (2, 40), (2, 16), (4, 8))  # rows and tokens of each period's micro-batch


def train(kernels: str, machine_code: bool = False, **parallel: Any) -> dict[str, Any]:
    """Train with a fresh compiler. Runs on every rank."""
    torch._dynamo.reset()
    counters.clear()
    # The graphs are what is tested here; making machine code of them takes most of the time.
    backend = "inductor" if machine_code else "aot_eager"
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
        return train_periods(kernels, 2 if machine_code else len(ROWS), parallel)


def train_periods(kernels: str, periods: int, parallel: dict[str, Any]) -> dict[str, Any]:
    """Periods of one step each, of rows of another length and number, with an evaluation after it."""
    config = make_config(model={"kernels": kernels}, parallel=parallel, sampler={"period": 1, "active_layers": 1})
    train_module = build_and_load(config)
    losses, drawn = [], []
    for period in range(periods):
        begin_period(train_module, period)
        drawn.append(tuple(train_module.active.blocks))
        batch = make_batch(*ROWS[period])
        losses.append(train_step(train_module, [batch], period, periods).loss)
        losses.append(mean_loss(train_module.store.module, train_module.objective, train_module.dims, [batch]))
    return {"losses": losses, "graphs": counters["stats"]["unique_graphs"], "sets": len(set(drawn))}


def make_batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * tokens).view(rows, tokens) % 127
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(tokens).expand(rows, tokens).contiguous()}


def test_two_graphs_serve_every_active_set_length_and_evaluation() -> None:
    plain = run_on_ranks(1, train, "eager")[0]
    compiled = run_on_ranks(1, train, "compile")[0]
    assert plain["graphs"] == 0 and plain["sets"] > 2
    assert compiled["graphs"] == 2  # a block that trains, and one that is frozen
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.soak
def test_blocks_that_come_from_host_memory_are_compiled_too() -> None:
    plain = run_on_ranks(1, train, "eager")[0]
    streamed = run_on_ranks(1, functools.partial(train, "compile", offload="frozen"))[0]
    assert streamed["graphs"] == 3  # of a block that trains, and of a frozen one forwards and again with gradients
    assert streamed["losses"] == pytest.approx(plain["losses"], rel=1e-4)


def kept_bytes(kind: str, compute: str) -> int:
    """What compiled blocks keep between their forward and their backward pass. Runs on a rank."""
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        config = make_config(
            model={"kernels": "compile", "architecture": {**ARCHITECTURE, "hidden_size": 48}},
            data={"packing": True},  # lengths of one size: graphs are made sooner
            sampler={"active_layers": 0},  # one graph serves all blocks
            precision={"compute": compute},
            parallel={"activation_checkpointing": kind},
        )
        train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device("cpu"))
    begin_period(train_module, 0)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = train_module.objective(train_module.store.module, make_batch(4, 48))
    loss.backward()
    return sum(kept.values())


# Of weights that stay whole, and those of FSDP2's classes.
@pytest.mark.parametrize("compute", [pytest.param("float32", marks=pytest.mark.soak), "bfloat16"])
def test_compiled_blocks_are_checkpointed(compute: str) -> None:
    kinds = ("none", "selective", "full")
    everything, products, inputs = (run_on_ranks(1, kept_bytes, kind, compute)[0] for kind in kinds)
    # Before transformers 5.18 checkpointing is around what is compiled, and products are kept where none sees them.
    products_seen = "__init_subclass__" in vars(GradientCheckpointingLayer)
    assert inputs < 0.5 * (products if products_seen else everything) and inputs <= products < everything


@pytest.mark.soak
def test_machine_code_of_the_graphs_gives_the_same_losses() -> None:
    plain = run_on_ranks(1, train, "eager", True)[0]
    assert run_on_ranks(1, train, "compile", True)[0]["losses"] == pytest.approx(plain["losses"], rel=1e-4)
