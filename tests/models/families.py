"""Tiny configurations of every decoder family that the tests train."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}

# family -> (model type, fields beside the common ones)
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 32, "num_hidden_layers": 4}),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "head_dim": 12}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"original_max_position_embeddings": 128}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **_EXPERTS}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, **_EXPERTS},
    ),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, **_EXPERTS}),
}

_GPT2_NAMES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"}

FAMILIES: list[str] = list(_FIELDS)


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return a fresh tiny configuration of ``family``, with ``changes`` to its fields."""
    model_type, fields = _FIELDS[family]
    common = {k: v for k, v in _COMMON.items() if family != "gpt2" or k not in _GPT2_NAMES | {"intermediate_size"}}
    return transformers.AutoConfig.for_model(model_type, **{**common, **fields, **changes})
