"""Every recipe of conf/experiment resolves, and fits the GPUs that its comment names."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import yaml

from lisa_dist.config.gpu import read_gpu
from lisa_dist.config.loading import conf_dir, group_choices, load
from lisa_dist.planning.changes import make_plan

EXPERIMENTS = [name for name in group_choices("experiment") if name != "demo"]
# GSM8K's sequences are shorter than Alpaca's, so of a model the first of these needs more.
PLANNED = [name for name in EXPERIMENTS if not name.startswith("gsm8k")]


def text(name: str) -> str:
    return Path(conf_dir() / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recipe_resolves_to_what_it_says(name: str) -> None:
    config = load([f"experiment={name}"])
    content = yaml.safe_load(text(name))
    chosen = {key.removeprefix("override /"): value for entry in content["defaults"] for key, value in entry.items()}
    assert (config.model.name, config.data.name) == (chosen["model"], chosen["data"])
    assert (config.method, config.sampler.name, config.update.name) == ("lisa", "uniform", "full_rank")
    assert config.sampler.active_layers == content["sampler"]["active_layers"]
    assert config.sampler.period == content["sampler"]["period"]
    assert config.optimizer.lr == content["optimizer"]["lr"]
    gpus = re.search(r"one (?:GPU|node of eight GPUs) of (\d+) GB", text(name))
    assert gpus is not None
    assert read_gpu(config.plan.gpu).description.endswith(f" {gpus[1]} GB")
    assert config.parallel.nproc_per_node == ("8" if "eight" in gpus[0] else "auto")
    ranks = 8 if "eight" in gpus[0] else 1
    assert config.train.global_batch_size % (config.train.micro_batch_size * ranks) == 0


@pytest.mark.parametrize("name", PLANNED)
def test_recipe_fits_its_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([f"experiment={name}"])
    ranks = 8 if config.parallel.nproc_per_node == "8" else 1
    config.train.global_batch_size = config.train.micro_batch_size * ranks  # more of them need no more memory
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    assert make_plan(config, read_gpu(config.plan.gpu)).fits
