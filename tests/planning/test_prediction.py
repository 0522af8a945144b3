"""The extrapolation over the depth against simulations of the whole depth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lisa_dist.config import Config, UserError
from lisa_dist.config.sampling import AllSamplerConfig, UniformSamplerConfig
from lisa_dist.planning import prediction, simulation
from lisa_dist.planning.prediction import has_equal_blocks, predict
from lisa_dist.planning.simulation import simulate

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 54,
    "intermediate_size": 101,
    "num_hidden_layers": 9,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "lisa": {},
    "full checkpointing, where a large vocabulary hides the blocks at small depths": {
        "parallel": {"activation_checkpointing": "full"},
        "vocab_size": 3001,
    },
    "all blocks": {"sampler": AllSamplerConfig()},
    "accumulation over 2 micro-batches, hybrid mesh": {
        "train": {"global_batch_size": 16},
        "parallel": {"replicate": 2, "nodes": 2},
    },
    "both": {
        "train": {"global_batch_size": 16},
        "parallel": {"replicate": 2, "nodes": 2, "activation_checkpointing": "full"},
        "vocab_size": 3001,
    },
    "frozen embeddings": {"always_active": {"embeddings": False}},
}


def make_config(case: dict[str, Any]) -> Config:
    config = Config()
    config.model.architecture = {**ARCHITECTURE, "vocab_size": case.get("vocab_size", 301)}
    config.data.sequence_length = 40
    config.sampler = case.get("sampler", UniformSamplerConfig(active_layers=1))
    config.train.global_batch_size = 4
    for group in ("parallel", "train", "always_active"):
        setattr(config, group, dataclasses.replace(getattr(config, group), **case.get(group, {})))
    config.parallel.nproc_per_node = "4"
    return config


# One extrapolates all that the others do.
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "both" else pytest.mark.soak) for c in CASES])
def test_prediction_from_two_depths_equals_the_whole_simulation(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(CASES[case])
    depths = []
    whole = simulate(config)
    monkeypatch.setattr(
        prediction, "simulate", lambda c, depth, least: depths.append(depth) or simulate(c, depth, least)
    )
    predicted = predict(config)
    assert None not in depths and max(depths) < 9
    for field in ("num_blocks", "num_active", "persistent_bytes", "host_bytes", "peak_bytes", "peak_at", "work"):
        assert getattr(predicted, field) == getattr(whole, field), field
    assert predicted.tokens == whole.tokens
    assert all(whole.peaks[moment] == peak for moment, peak in predicted.peaks.items())


@pytest.mark.parametrize("offload", ["none", "frozen"])
def test_two_micro_batches_of_one_rank_say_what_all_need(offload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({"train": {"global_batch_size": 5, "micro_batch_size": 1}, "parallel": {"offload": offload}})
    config.parallel.nproc_per_node = "1"
    if offload == "frozen":
        config.precision.frozen = config.precision.compute
    found = simulate(config, 6)
    monkeypatch.setattr(simulation, "simulated_micro_batches", simulation.micro_batches_per_step)
    whole = simulate(config, 6)
    assert dataclasses.replace(found, peaks=whole.peaks) == whole
    tokens = 3 * 3 * 8 * config.data.sequence_length  # of the micro-batches left out, which lie beside the model here
    assert found.peaks == {phase: pytest.approx(peak, abs=tokens) for phase, peak in whole.peaks.items()}


def test_blocks_that_differ_are_simulated_one_by_one() -> None:
    config = make_config({})
    assert has_equal_blocks(config.model)
    config.model.architecture = {
        **ARCHITECTURE,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention"] * 8 + ["full_attention"],
        "head_dim": 18,
    }
    assert not has_equal_blocks(config.model)


def test_the_explicit_mask_of_packed_samples_is_planned() -> None:
    """OPT: the mask of packed rows, a byte an entry, and what the kernel makes of it."""
    peaks = {}
    for packing in (False, True):
        config = make_config({"train": {"global_batch_size": 4, "micro_batch_size": 1}})
        config.model.architecture = {
            "model_type": "opt",
            **{"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32},
            **{"num_hidden_layers": 2, "num_attention_heads": 2},
        }
        config.data.packing, config.data.sequence_length, config.model.attention = packing, 1024, "sdpa"
        config.model.loss_chunk = str(2**16)
        peaks[packing] = simulate(config).peak_bytes
    assert peaks[True] - peaks[False] >= 1024**2


def test_a_plan_of_packed_rows_is_refused_where_training_is() -> None:
    config = make_config({})
    config.model.architecture = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config.data.packing = True
    with pytest.raises(UserError, match=r"MambaForCausalLM does not keep packed samples apart.*data\.packing=false"):
        simulate(config)
