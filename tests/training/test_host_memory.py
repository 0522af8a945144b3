"""The memory of a process does not grow with its steps."""

from __future__ import annotations

import gc
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lisa_dist.config import Config
from lisa_dist.training import loop
from tests.support.ranks import run_on_ranks
from tests.support.runs import make_config

STEPS, SETTLED = 1000, 300  # by then every shape has been seen and every allocator has its arenas
MIB = 2**20


def measured(config: Config) -> list[dict[str, int]]:
    """Train, and note every 50 steps what the process holds and what only a search for garbage would find."""
    notes = []
    train_step = loop.train_step

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        if number % 50 == 49:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            tensors = sum(isinstance(found, torch.Tensor) for found in gc.get_objects())
            notes.append({"step": number + 1, "resident": pages * resource.getpagesize(), "tensors": tensors})
        return train_step(train_module, micro_batches, number, *rest, **more)

    with mock.patch.object(loop, "train_step", step):
        loop.train(config)
    return notes


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_thousand_steps_and_two_hundred_switches_hold_no_more_than_the_first(ranks: int, tmp_path: Path) -> None:
    settings = (f"train.max_steps={STEPS}", "sampler.period=5", "train.global_batch_size=2", "checkpoint.every=0")
    config = make_config(tmp_path, *settings, "train.eval_every=100", "train.log_every=10")
    for notes in run_on_ranks(ranks, measured, config):
        print(*notes, sep="\n")
        settled = [note for note in notes if note["step"] > SETTLED]
        grown = settled[-1]["resident"] - settled[0]["resident"]
        assert grown < 4 * MIB, f"{grown / MIB:.1f} MiB over {STEPS - SETTLED} steps"
        assert settled[-1]["tensors"] < settled[0]["tensors"] + 50, "as many as between two searches"
