"""Trainings of a small model of which the frozen blocks stream, beside others of which they do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.method import probes
from lisa_dist.method.module import TrainModule, begin_period, build_train_module, load_initial_weights
from lisa_dist.sharding.resident import ResidentStore
from lisa_dist.sharding.streamed import StreamedStore
from lisa_dist.training.step import train_step
from tests.support.families import tiny_config
from tests.support.small_training import make_config, make_global_batches

CPU = torch.device("cpu")
BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}
STEPS, MICRO_BATCHES = 6, 2  # a period is two steps
TIED = {"tie_word_embeddings": True}
FROZEN_ENDS = ["always_active.embeddings=false", "always_active.norm=false", "always_active.head=false"]


def configured(overrides: list[str], precision: dict[str, str], family: str, **architecture: Any) -> Config:
    config = make_config(precision=precision)
    if family != "llama":
        config.model.architecture = tiny_config(family, **architecture).to_diff_dict()
    else:
        config.model.architecture |= architecture
    chosen = load([*overrides, "sampler.period=2"])
    config.update, config.sampler, config.always_active = chosen.update, chosen.sampler, chosen.always_active
    config.data.packing, config.model.quantization = chosen.data.packing, chosen.model.quantization
    return config


def built(config: Config, offload: str, slots: int = 2, **parallel_keys: Any) -> TrainModule:
    parallel = dataclasses.replace(config.parallel, offload=offload, prefetch=slots - 1, **parallel_keys)
    train_module = build_train_module(dataclasses.replace(config, parallel=parallel))
    assert type(train_module.store) is (ResidentStore if offload == "none" else StreamedStore)
    return train_module


def filled(config: Config, offload: str, slots: int = 2, **parallel_keys: Any) -> TrainModule:
    """The same, with the weights to start from."""
    train_module = built(config, offload, slots, **parallel_keys)
    load_initial_weights(train_module, CPU)
    return train_module


def packed(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Samples as one sequence, each with positions of its own; nothing predicts a sample's first token."""
    parts = [{**sample, "labels": sample["labels"].index_fill(1, torch.tensor([0]), -100)} for sample in samples]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in samples[0]}


def run_steps(
    train_module: TrainModule, first: int = 0, last: int = STEPS, saver: CheckpointSaver | None = None
) -> list[float]:
    """Make steps, with a held-out loss before each draw; a checkpoint after each. Returns the losses."""
    batches, found = make_global_batches(STEPS, MICRO_BATCHES), []
    if train_module.config.data.packing:
        batches = [[packed(step), packed(step[::-1])] for step in batches]
    store = train_module.store
    for step in range(first, last):
        if step % 2 == 0:
            found.append(probes.mean_loss(store.module, train_module.objective, train_module.dims, batches[-1]))
            begin_period(train_module, step // 2, lambda count: batches[0][:count])
        found.append(train_step(train_module, batches[step], step, STEPS).loss)
        if saver is not None:
            saver.save(Progress(step=step + 1))
    return found


def weights(train_module: TrainModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in train_module.store.tensors().items()}
