"""Options drawn at random, many at a time: a run that is cut short and resumed is the uninterrupted one.

Pairs are tried one by one elsewhere; what three or more options do together shows here, bit for bit.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import pytest

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations, check_global_batch, check_streamed
from lisa_dist.sharding.dimensions import ParallelDims
from tests.support.families import FAMILIES, tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.runs import Kill, assert_same_run, make_config, train_here

RUNS = 20
DEFAULT = ""  # an option that is left as it is
OPTIONS: list[list[str]] = [
    ["update=full_rank", "update=lora", "update=lora_fa", "update=low_rank"],
    [f"sampler={name}" for name in ("uniform", "all", "bandit", "gradient", "importance", "outlier", "sweep")],
    [DEFAULT, "optimizer=lion"],
    [DEFAULT, "optimizer.in_backward=true"],
    [DEFAULT, "optimizer.state_on_freeze=offload"],
    [DEFAULT, "optimizer.part_lr={embeddings:1e-3}"],
    [DEFAULT, "always_active.norm=false", "always_active={embeddings:false,head:false}"],
    [DEFAULT, "model.quantization=int8", "model.quantization=nf4"],
    [DEFAULT, "precision.compute=float32", "precision={frozen:float32,compute:float32}"],
    [DEFAULT, "parallel.replicate=2"],
    [DEFAULT, "parallel.optimizer_shard=world"],
    [DEFAULT, "parallel.offload=frozen", "parallel.offload=all", "parallel={offload:auto,memory_limit:2.01}"],
    [DEFAULT, "parallel.block_major=true"],
    [DEFAULT, "parallel.activation_checkpointing=selective", "parallel.activation_checkpointing=full"],
    [DEFAULT, "parallel.defer_reduction=true"],
    [DEFAULT, "data.packing=true", "data.group_by_length=true"],
    [DEFAULT, "train={epochs:1.5,max_steps:null}"],
    [DEFAULT, "train.log_every=2"],
    [DEFAULT, "train={spike_factor:1.02,spike_window:3}"],
    [DEFAULT, "checkpoint.async=true"],
    [DEFAULT, "checkpoint.full_every=3"],
    ["checkpoint.every=1", "checkpoint.every=2"],
    ["sampler.period=1", "sampler.period=2", "sampler.period=3"],
    ["train.micro_batch_size=1", "train.micro_batch_size=2"],
]


def draw(seed: int, run_dir: Path) -> tuple[Config, int, list[Kill]]:
    """A run whose options go together, its number of ranks, and where it is cut short."""
    draws = random.Random(seed)
    while True:
        chosen = [draws.choice(values) for values in OPTIONS]
        ranks, held_out = draws.choice([1, 2, 3, 4]), f"train.eval_every={draws.choice([1, 3])}"
        groups = [word for word in chosen if word.startswith(("update=", "sampler=", "optimizer="))]
        others = [word for word in chosen if word not in groups and word != DEFAULT]
        batch = f"train.global_batch_size={draws.choice([1, 2, 4]) * ranks}"
        try:
            config = make_config(run_dir, *groups, "data.limit=40", "data.validation=0.2", held_out, batch, *others)
            config.optimizer.grad_clip *= not config.optimizer.in_backward
            check_combinations(config)
            check_streamed(config, ranks)
            check_global_batch(config.train, ranks)
            check_accumulation(config, ParallelDims.of(config.parallel, ranks).data_ranks)
        except UserError:
            continue
        architecture = tiny_config(draws.choice(FAMILIES)).to_diff_dict()
        config.model.architecture = {**json.loads(json.dumps(architecture)), "vocab_size": 1024}
        kills = [Kill(draws.choice(["before", "inside"]), draws.choice([2, 3, 4])) for _ in range(draws.choice([1, 2]))]
        return config, ranks, kills


def train_or_refuse(config: Config, kill: Kill | None = None) -> int | str | None:
    """Train; a refusal is returned as its sentence. Runs on every rank."""
    try:
        return train_here(config, kill)
    except UserError as error:
        return str(error)


@pytest.mark.soak
def test_a_run_of_any_options_goes_on_where_it_was_cut_short(tmp_path: Path, subtests: pytest.Subtests) -> None:
    refused = 0
    for seed in range(RUNS):
        with subtests.test(str(seed)):
            config, ranks, kills = draw(seed, tmp_path / "whole")
            ended = run_on_ranks(ranks, train_or_refuse, config)[0]
            refused += isinstance(ended, str)  # by the model drawn
            if not isinstance(ended, str):
                cut = copy.deepcopy(config)
                cut.run.dir = str(tmp_path / "cut")
                for kill in kills:
                    run_on_ranks(ranks, train_or_refuse, cut, kill)
                    cut.checkpoint.resume = "auto"
                assert set(run_on_ranks(ranks, train_or_refuse, cut)) == {0}
                assert_same_run(tmp_path / "cut", tmp_path / "whole")
        for run_dir in ("whole", "cut"):
            shutil.rmtree(tmp_path / run_dir, ignore_errors=True)
    assert refused < RUNS / 4
