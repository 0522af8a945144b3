"""Configurations that are planned and measured, and the measuring of a real rank."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from lisa_dist.commands.bench.stopwatch import PeakMemory
from lisa_dist.config import Config
from lisa_dist.config.sampling import AllSamplerConfig, FixedSamplerConfig
from lisa_dist.method.module import (
    add_trained_params,
    allocate,
    begin_period,
    build_train_module,
    count_persistent_bytes,
)
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step

BLOCKS, TOKENS, VOCABULARY, HIDDEN = 3, 96, 515, 90


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 5, "intermediate_size": 201},
    "qwen3 with tied weights": {
        "model_type": "qwen3",
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 150,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 80,  # grouped products want multiples of 16 bytes
        "num_key_value_heads": 5,
        "intermediate_size": 72,
        "num_local_experts": 3,
    },
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 5, "head_dim": 24, "intermediate_size": 170},
}


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lisa": {},
    "full, two micro-batches": {"sampler": {"name": "all"}, "train": {"global_batch_size": 8}},
    "fp32, larger micro-batch": {
        "precision": {"frozen": "float32", "compute": "float32"},
        "train": {"micro_batch_size": 3, "global_batch_size": 6},
    },
    "gathered weights kept, gradients reduced once": {
        "parallel": {"reshard_after_forward": False, "defer_reduction": True},
        "train": {"global_batch_size": 8},
    },
    "selective checkpointing": {"parallel": {"activation_checkpointing": "selective"}},
    "selective checkpointing in fp32": {
        "precision": {"frozen": "float32", "compute": "float32"},
        "train": {"micro_batch_size": 3, "global_batch_size": 6},
        "parallel": {"activation_checkpointing": "selective"},
    },
    "checkpointing that fits, chosen block by block": {
        "parallel": {"activation_checkpointing": "auto", "memory_limit": 2 + 0.006},
    },
}


def make_config(model: str, setting: str) -> Config:
    config = Config()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": BLOCKS}
    config.model.architecture = {**sizes, "num_attention_heads": 5, **MODELS[model]}
    config.model.init = "random"
    config.model.loss_chunk = "64"
    config.model.kernels = "eager"  # as on the CPU that is measured
    config.data.sequence_length = TOKENS
    config.train.global_batch_size, config.train.micro_batch_size = 4, 2
    config.parallel.nproc_per_node = "2"
    config.sampler = FixedSamplerConfig(blocks=[BLOCKS - 2, BLOCKS - 1])
    for group, fields in SETTINGS[setting].items():
        if fields.get("name") == "all":
            config.sampler = AllSamplerConfig()
        else:
            setattr(config, group, dataclasses.replace(getattr(config, group), **fields))
    return config


def measure(config: Config) -> tuple[dict[str, int], int]:
    """Count persistent bytes, and record on rank 0 the peak of a switch and a step. Runs on every rank."""
    train_module = build_train_module(config)
    ranks = distributed.world_size()
    batch = {
        "input_ids": torch.randint(0, VOCABULARY, (config.train.micro_batch_size, TOKENS)),
        "labels": torch.randint(0, VOCABULARY, (config.train.micro_batch_size, TOKENS)),
        "position_ids": torch.arange(TOKENS).expand(config.train.micro_batch_size, TOKENS).contiguous(),
    }
    gc.collect()  # models of earlier tests in this process would be freed, and counted, in between
    batches = [batch] * (config.train.global_batch_size // config.train.micro_batch_size // ranks)
    counted: dict[str, int] = {}

    @contextmanager
    def count(part: str) -> Iterator[None]:
        if part == "optimizer":
            counted.update(count_persistent_bytes(train_module))
        yield

    measured = PeakMemory(torch.device("cpu"))
    with measured if distributed.is_main() else nullcontext():
        allocate(train_module, [0, 1] if config.sampler.name == "fixed" else list(range(BLOCKS)), torch.device("cpu"))
        for name in train_module.store.names:
            distributed.local_shard(train_module.store.parameter(name).detach()).fill_(0.01)
        add_trained_params(train_module)
        begin_period(train_module, 0)
        train_step(train_module, batches, 0, 2, stopwatch=count)
    return counted, measured.bytes
