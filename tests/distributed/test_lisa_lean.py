"""Embeddings and head that are drawn like blocks: what trains, its numbers, its bytes, and how a run goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.config.updates import AlwaysActiveConfig
from lisa_dist.method.module import begin_period, build_train_module, count_persistent_bytes, load_initial_weights
from lisa_dist.planning.prediction import predict
from lisa_dist.training.step import accumulate_gradients, train_step
from tests.support import planned
from tests.support.compared import STEPS, compare, train_on_rank
from tests.support.plain_methods import adam, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, make_config, make_global_batches

CPU = torch.device("cpu")
ENDS = {"model.embed_tokens.weight", "lm_head.weight"}
# The seeds' draws of three periods: which ends are among them.
EMBEDDINGS, HEAD = ({name} for name in sorted(ENDS, reverse=True))
SEEDS = [
    (2, False, [ENDS, set(), HEAD]),
    (11, False, [EMBEDDINGS, HEAD, EMBEDDINGS]),
    (8, True, [EMBEDDINGS, EMBEDDINGS, set()]),
]
RESUMED = 11
WORST = 5  # whose third draw is of both
SAVED = 3  # steps, in the middle of a period that trains an end


def lean_config(seed: int, tied: bool = False) -> Config:
    """Two of three blocks, embeddings and head at a time."""
    config = make_config()
    config.model.architecture |= {"num_hidden_layers": 3, "tie_word_embeddings": tied}
    config.sampler = UniformSamplerConfig(active_layers=2, period=2, seed=seed, non_block_modules=True)
    config.always_active = AlwaysActiveConfig(embeddings=False, head=False)
    # Else entries whose gradient is rounding errors make whole steps, whose direction depends on the processor.
    config.optimizer.lr, config.optimizer.eps = 1e-2, 1e-6
    return config


@pytest.mark.parametrize(
    ("seed", "tied", "ends"), [SEEDS[0], pytest.param(*SEEDS[1], marks=pytest.mark.soak), SEEDS[2]]
)
def test_training_equals_plain_pytorch_on_what_was_drawn(seed: int, tied: bool, ends: list[set[str]]) -> None:
    config = lean_config(seed, tied)
    result = run_on_ranks(2, train_on_rank, config)[0]
    assert [ENDS & set(names) for names in result["trained"][::2]] == ends
    for names, blocks in zip(result["trained"][::2], result["draws"]):
        assert len(blocks) + len(ENDS & set(names)) == 2 and "model.norm.weight" in names
    compare(result, plain_model(config), config, adam)


def resume(directory: Path) -> list[Any]:
    """Losses and weights of a run, and of one that goes on from its checkpoint. Runs on one rank."""
    config, found = lean_config(RESUMED), []
    for first in (0, SAVED):
        train_module = build_train_module(config)
        if first:
            restore_checkpoint(train_module, directory / checkpoint_name(SAVED), CPU, data={})
            assert train_module.active.modules
        else:
            load_initial_weights(train_module, CPU)
        losses = []
        for step, batch in list(enumerate(make_global_batches(STEPS)))[first:]:
            if step % 2 == 0:
                begin_period(train_module, step // 2)
            losses.append(train_step(train_module, batch, step, STEPS).loss)
            if not first and step + 1 == SAVED:
                CheckpointSaver(train_module, directory, to_yaml(config)).save(Progress(step=SAVED))
        weights = {name: tensor.clone() for name, tensor in train_module.store.tensors().items()}
        found.append((losses, weights, train_module.active.drawn))
    return found


def test_a_run_goes_on_with_the_end_that_it_trained(tmp_path: Path) -> None:
    straight, resumed = run_on_ranks(1, resume, tmp_path)[0]
    assert resumed[0] == straight[0][SAVED:] and resumed[2] == straight[2]
    assert all(torch.equal(tensor, resumed[1][name]) for name, tensor in straight[1].items())


def bytes_of_draws(config: Config) -> list[tuple[list[str], int]]:
    """What was drawn in each period, and the persistent bytes. Runs on every rank."""
    train_module = build_and_load(config)
    ids = torch.zeros((1, 8), dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(8)[None]}
    found = []
    for period in range(5):
        begin_period(train_module, period)
        accumulate_gradients(train_module, [batch])
        found.append((train_module.active.drawn, sum(count_persistent_bytes(train_module).values())))
        train_module.optimizer.drop_gradients()
    return found


def test_the_plan_is_that_of_the_draw_that_needs_most() -> None:
    config = planned.make_config("llama", "lisa")
    config.model.architecture["vocab_size"] = 2001  # so that an end is larger than a block
    config.sampler = UniformSamplerConfig(active_layers=2, seed=WORST, non_block_modules=True)
    config.always_active = AlwaysActiveConfig(embeddings=False, head=False)
    counted = run_on_ranks(2, bytes_of_draws, config)[0]
    foretold = predict(config)
    most = max(size for _, size in counted)
    assert sum(foretold.persistent_bytes.values()) == most
    assert {len(drawn) for drawn, _ in counted} == {2} and len({size for _, size in counted}) > 1


def losses_of(config: Config) -> list[float]:
    """Twelve epochs of six batches. Runs on one rank."""
    train_module = build_and_load(config)
    losses = []
    for step in range(12 * STEPS):
        if step % config.sampler.period == 0:
            begin_period(train_module, step // config.sampler.period)
        losses.append(train_step(train_module, make_global_batches(STEPS)[step % STEPS], step, 12 * STEPS).loss)
    return losses


def test_it_learns() -> None:
    losses = run_on_ranks(1, losses_of, lean_config(0))[0]
    frozen = lean_config(0)
    frozen.sampler = dataclasses.replace(frozen.sampler, active_layers=0)
    assert sum(losses[-STEPS:]) < 0.6 * sum(losses[:STEPS])
    without = run_on_ranks(1, losses_of, frozen)[0]  # the norm alone
    assert sum(losses[-STEPS:]) < 0.8 * sum(without[-STEPS:])


@pytest.mark.soak
def test_its_planned_peak_is_below_that_of_peft() -> None:
    shapes = [
        "model=llama3_1_8b",
        "parallel.nproc_per_node=1",
        "data.sequence_length=4096",
        "train.global_batch_size=1",
    ]
    peft = 48.0 * 2**30  # Trainer with PEFT's LoRA r16, measured on an H100 at these shapes
    assert predict(load([*shapes, "method=lisa_lean"])).peak_bytes < peft
