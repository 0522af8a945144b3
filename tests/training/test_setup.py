"""What a run says of its data and its model before the first step."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from lisa_dist.config import DataConfig, ModelConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import read_architecture
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.training import setup
from lisa_dist.training.announcement import warn_of_positions, warn_of_warmup
from lisa_dist.training.setup import check_positions, rows_of


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [
        ({"model_type": "llama", "max_position_embeddings": 64}, 64),
        ({"model_type": "gpt2", "n_positions": 32}, 32),
        ({"model_type": "mpt", "max_seq_len": 48}, 48),
    ],
)
def test_sequences_longer_than_the_models_positions_are_warned_of(architecture, positions, caplog):
    built = read_architecture(ModelConfig(init="random", architecture=architecture))
    warn_of_positions(positions, built)
    assert caplog.text == ""
    warn_of_positions(positions + 1, built)
    assert f"data.sequence_length={positions + 1}: is above the {positions} positions of the model" in caplog.text


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


def test_a_warm_up_longer_than_the_run_is_warned_of(caplog):
    config = load(["scheduler.warmup_steps=40"])
    warn_of_warmup(config, 40)
    assert caplog.text == ""
    warn_of_warmup(config, 10)
    assert "scheduler.warmup_steps=40: is above the 10 steps of the run, whose learning rate ends at 25%" in caplog.text


def test_a_global_batch_that_does_not_fit_the_ranks_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "read_architecture", lambda *_: pytest.fail("the model was read first"))
    monkeypatch.setattr(setup, "pretrained_architecture", lambda *_: pytest.fail("the model was read first"))
    config = load([f"run.dir={tmp_path}", "train.global_batch_size=6", "train.micro_batch_size=1"])
    with pytest.raises(UserError, match=r"train\.global_batch_size=6: must be a mul.* 1 x 4; near are 4 and 8"):
        setup.prepare_run(config, ParallelDims(4, replicate=2, shard=2))
    assert not list(tmp_path.iterdir())


def test_special_tokens_that_the_model_has_no_place_for_are_refused_where_a_row_holds_one(tmp_path):
    """As Gemma 3 1B's tokenizer has one for images, behind the last token that the model knows."""
    tokenizer = load_tokenizer("builtin:demo")
    known = 1 + max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    architecture = {"model_type": "llama", "vocab_size": known}
    config = ModelConfig(init="random", tokenizer=str(tmp_path / "tokenizer"), architecture=architecture)
    opened = setup.open_tokenizer(config)
    for text in ("no image", "an <image_soft_token>"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}))
        data = DataConfig(path=str(tmp_path / "rows.jsonl"), format="text", cache_dir=str(tmp_path / "cache"))
        prepared = prepare_data(data, opened, seed=0)
        if text == "no image":
            setup.check_tokens(prepared.train, opened, known)
        else:
            with pytest.raises(UserError, match=rf"holds the token <image_soft_token> \(number {known}\)"):
                setup.check_tokens(prepared.train, opened, known)
    for add in (
        lambda: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),  # which batches hold, whatever the rows do
        lambda: (tokenizer.add_special_tokens({"pad_token": "</s>"}), tokenizer.add_tokens(["word"])),
    ):
        add()
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        with pytest.raises(UserError, match=f"tokens but the model knows {known}; choose the model's own"):
            setup.open_tokenizer(config)


def test_the_summary_counts_the_rows_of_both_sources(tmp_path):
    for name, count in (("train", 7), ("test", 3)):
        lines = [json.dumps({"prompt": "q", "completion": "a"}) for _ in range(count)] + ["{"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = DataConfig(path=str(tmp_path / "train.jsonl"), on_bad_row="skip", cache_dir=str(tmp_path / "cache"))
    left_out = {"bad: not valid JSON": 1}
    rows = {"rows": {"read": 8, "used": 7, "cut": 0, "left_out": left_out}}
    assert rows_of(prepare_data(data, load_tokenizer("builtin:demo"), seed=0)) == rows
    data.validation = str(tmp_path / "test.jsonl")
    rows["validation_rows"] = {"read": 4, "used": 3, "cut": 0, "left_out": left_out}
    assert rows_of(prepare_data(data, load_tokenizer("builtin:demo"), seed=0)) == rows
