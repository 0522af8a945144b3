"""Every recipe of conf/experiment resolves, and fits the GPUs that its comment names, as its plan there says."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from pathlib import Path

import pytest
import yaml

from lisa_dist.config import Config
from lisa_dist.config.gpu import read_gpu
from lisa_dist.config.loading import conf_dir, group_choices, load
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.planning.changes import make_plan
from lisa_dist.planning.simulation import architecture_of
from lisa_dist.sharding.memory_policy import RESERVED_BYTES

EXPERIMENTS = [name for name in group_choices("experiment") if name != "demo"]
ALWAYS = ("gsm8k_tinyllama",)  # a plan takes seconds, so the others by make soak
PLANNED = [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.soak) for name in EXPERIMENTS]
GIB = 2**30


def ranks(config: Config) -> int:
    return 8 if config.parallel.nproc_per_node == "8" else 1


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
    assert config.train.global_batch_size % (config.train.micro_batch_size * ranks(config)) == 0


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the comment of a recipe says of its plan, in GiB of a rank."""

    persistent: float
    peak: float
    left: float


def recorded(name: str) -> Recorded:
    gpu = load([f"experiment={name}"]).plan.gpu
    line = rf"^# lisa-dist plan experiment={name}: (\S+) GiB persistent, peak (\S+) GiB, (\S+) GiB of {gpu} left.$"
    found = re.search(line, text(name), re.MULTILINE)
    assert found is not None, line
    return Recorded(*map(float, found.groups()))


@functools.cache
def parameters(model: str) -> tuple[int, int, int, int]:
    """Return how many parameters a model has, how many of them a block and the embeddings have, and the blocks."""
    config = load([f"model={model}", "experiment=null"])
    module = build_meta_model(config.model, architecture_of(config.model))
    layers = find_layers(module, config.model.blocks)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (module, layers.blocks[0], *layers.embeddings)]
    return sizes[0], sizes[1], sum(sizes[2:]), len(layers.blocks)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recorded_plan_obeys_the_memory_law_and_fits(name: str) -> None:
    config, plan = load([f"experiment={name}"]), recorded(name)
    total, block, embeddings, blocks = parameters(config.model.name)
    frozen = (blocks - config.sampler.active_layers) * block
    copies = total - frozen - embeddings if ranks(config) == 1 else 0  # beside masters of whole weights
    persistent = 2 * frozen + 16 * (total - frozen) + 2 * copies
    assert plan.persistent * GIB == pytest.approx(persistent / ranks(config), rel=0.01)
    assert plan.persistent < plan.peak and plan.left > 0
    memory = read_gpu(config.plan.gpu).memory_bytes - RESERVED_BYTES
    assert plan.peak + plan.left == pytest.approx(memory / GIB, abs=0.02)


@pytest.mark.parametrize("name", PLANNED)
def test_recorded_plan_is_what_the_planner_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([f"experiment={name}"])
    monkeypatch.setattr(logging.root.manager, "disable", logging.INFO)
    plan = make_plan(config, read_gpu(config.plan.gpu))
    found = (sum(plan.trace.persistent_bytes.values()) / GIB, plan.trace.peak_bytes / GIB)
    assert found == pytest.approx((recorded(name).persistent, recorded(name).peak), rel=0.01)
    assert plan.fits
