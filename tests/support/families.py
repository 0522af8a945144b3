"""Tiny configurations of every decoder family that the tests train."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lisa_dist.config import ModelConfig
from lisa_dist.models.architecture import build_meta_model

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2_SHAPE: dict[str, Any] = {
    **{"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128},
    **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
_GEMMA3_LAYERS: dict[str, Any] = {  # both kinds of its attention, each with rotary frequencies of its own
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
_NEOX_DROPOUT: dict[str, Any] = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}

# family -> (model type, fields beside the common ones)
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SHAPE),
    "qwen2": ("qwen2", {**_SHAPE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_SHAPE, "head_dim": 16}),
    "mistral": ("mistral", {**_SHAPE, "sliding_window": None}),
    "gemma": ("gemma", {**_SHAPE, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_SHAPE, "head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_SHAPE, **_GEMMA3_LAYERS, "head_dim": 16, "sliding_window": 32}),
    "gpt2": ("gpt2", _GPT2_SHAPE),
    "gpt_neox": ("gpt_neox", {**_SHAPE, **_NEOX_DROPOUT, "rotary_pct": 0.5}),
    "phi": ("phi", {**_SHAPE, "partial_rotary_factor": 0.5, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "phi3": ("phi3", {**_SHAPE, "original_max_position_embeddings": 128, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "olmo": ("olmo", _SHAPE),
    "olmo2": ("olmo2", _SHAPE),
    "mixtral": ("mixtral", {**_SHAPE, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_SHAPE, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "gpt_oss": (
        "gpt_oss",
        {**_SHAPE, **_EXPERTS, "num_local_experts": 4, "head_dim": 16, "sliding_window": 32}
        | {"layer_types": ["full_attention"] * 3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "qwen3_moe": ("qwen3_moe", {**_SHAPE, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
    "glm4_moe": (
        "glm4_moe",
        {**_SHAPE, "head_dim": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_SHAPE, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
}

PARTLY_TRIED = ("gpt_oss", "glm4_moe", "ernie4_5_moe")  # for what is their own
FAMILIES: list[str] = [family for family in _FIELDS if family not in PARTLY_TRIED]


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return a fresh tiny configuration of ``family``, with ``changes`` to its fields."""
    model_type, fields = _FIELDS[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **fields, **changes})


def meta_model(family: str) -> Any:
    """Return the tiny model of ``family`` on ``meta``."""
    return build_meta_model(ModelConfig(), tiny_config(family))
