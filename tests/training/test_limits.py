"""Tokens and positions that a model has no place for."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from lisa_dist.config import DataConfig, ModelConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import read_architecture
from lisa_dist.training.limits import check_positions, check_streaming, check_tokens, open_tokenizer


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"model_type": "gpt2", "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ({"model_type": "mpt", "max_seq_len": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}, True),
        ({"model_type": "llama", "max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 4}, False),
        ({"model_type": "xglm", "max_position_embeddings": 64, "d_model": 32, "attention_heads": 4}, False),  # it grows
    ],
)
def test_rows_longer_than_a_table_of_positions_are_refused(fields, refused):
    config = ModelConfig(init="random", architecture={"num_hidden_layers": 2, **fields})
    architecture = read_architecture(config)
    check_positions(config, architecture, 64)
    with pytest.raises(UserError, match=r"rows are 72 tokens .* a table of 64") if refused else nullcontext():
        check_positions(config, architecture, 72)


def test_reformer_is_refused():
    config = ModelConfig(init="random", architecture={"model_type": "reformer", "is_decoder": True})
    with pytest.raises(UserError, match="model_type=reformer can't be trained here"):
        check_positions(config, read_architecture(config), 64)


SHARING = {
    **{"model_type": "gemma4_text", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16},
    **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
}


@pytest.mark.parametrize(
    ("shared", "overrides", "refused"),
    [(2, ["method=lisa"], True), (2, ["method=lisa", "parallel.offload=none"], False), (0, ["method=lisa"], False)],
)
def test_blocks_that_share_keys_and_values_do_not_stream(shared, overrides, refused):
    config = load(["precision.frozen=float32", "precision.compute=float32", "parallel.offload=frozen", *overrides])
    config.model = ModelConfig(init="random", architecture={**SHARING, "num_kv_shared_layers": shared})
    architecture = read_architecture(config.model)
    says = r"Gemma4ForCausalLM gets other gradients, as of model\..* set parallel.offload=none or all"
    with pytest.raises(UserError, match=says) if refused else nullcontext():
        check_streaming(config, architecture, 1)


def test_special_tokens_that_the_model_has_no_place_for_are_refused_where_a_row_holds_one(tmp_path):
    """As Gemma 3 1B's tokenizer has one for images, behind the last token that the model knows."""
    tokenizer = load_tokenizer("builtin:demo")
    known = 1 + max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    architecture = {"model_type": "llama", "vocab_size": known}
    config = ModelConfig(init="random", tokenizer=str(tmp_path / "tokenizer"), architecture=architecture)
    opened = open_tokenizer(config)
    for text in ("no image", "an <image_soft_token>"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
        data = DataConfig(path=str(tmp_path / "rows.jsonl"), format="text", cache_dir=str(tmp_path / "cache"))
        prepared = prepare_data(data, opened, seed=0)
        if text == "no image":
            check_tokens(prepared.train, opened, known)
        else:
            with pytest.raises(UserError, match=rf"holds the token <image_soft_token> \(number {known}\)"):
                check_tokens(prepared.train, opened, known)
    for add in (
        lambda: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),  # which batches hold, whatever the rows do
        lambda: (tokenizer.add_special_tokens({"pad_token": "</s>"}), tokenizer.add_tokens(["word"])),
    ):
        add()
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(UserError, match=f"tokens but the model knows {known}; choose the model's own"):
            open_tokenizer(config)
