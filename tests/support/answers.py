"""Small models of several kinds, and prompts for them, to compare the ways in which answers are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lisa_dist.config import Config
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.runtime import distributed
from lisa_dist.training.generation import Answerer, AnswerSettings
from tests.support.families import tiny_config
from tests.support.small_training import build_and_load, make_config

LENGTHS = (17, 9, 21, 4, 13)  # of the prompts: above and below the sliding window
NEW_TOKENS = 8
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [8.0] * 6}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {},
    "gpt2": {"initializer_range": 0.2},
    # Its frequencies follow the longest row of a batch above so many tokens.
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 26},
    "xlnet": {},  # has a cache of its own kind, which changes its answers
    "llama, lora": {},
    "llama, packed": {},  # in training its attention is without masks
    "qwen2, int8": {},
    "llama, streamed": {},  # blocks come from host memory, on one rank
}
HOW: dict[str, str] = dict.fromkeys(CASES, "batched") | {"xlnet": "none"}
XLNET = {"model_type": "xlnet", "vocab_size": 128, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64}


def case_config(name: str, **changes: Any) -> Config:
    """A model in float32 whose random weights give answers that vary."""
    family, _, kind = name.partition(", ")
    fields = {"initializer_range": 0.3, **CASES[name]}
    if family == "xlnet":
        architecture = {**XLNET, "attn_type": "uni", "initializer_range": 0.3}
    else:
        architecture = tiny_config(family, **fields).to_dict()
    model = {"architecture": architecture, "quantization": kind if kind == "int8" else "none"}
    config = make_config(model=model, **changes)
    config.data.packing = kind == "packed"
    if kind == "streamed":
        config.parallel.offload = "frozen"
    if kind in ("lora", "int8"):
        config = dataclasses.replace(config, update=LoraUpdateConfig())
    return config


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


def answerer_of(name: str, **changes: Any) -> Answerer:
    train_module = build_and_load(case_config(name, **changes), distributed.device())
    store = train_module.store
    for parameter in store.names:
        if "lora_B" in parameter:
            with torch.no_grad():
                store.master(parameter).fill_(0.05)
    return Answerer(train_module)


def greedy(*stops: int, **changes: Any) -> AnswerSettings:
    return AnswerSettings(frozenset(stops), NEW_TOKENS, **{"batch_size": 2, **changes})
