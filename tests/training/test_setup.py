"""What a run says of its data and its model before the first step."""

from __future__ import annotations

import json

import datasets
import pytest
from transformers import Qwen3Config

from lisa_dist.config import DataConfig, ModelConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.sequences import Sequences
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import read_architecture
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.training import setup
from lisa_dist.training.announcement import (
    warn_of_demonstration,
    warn_of_positions,
    warn_of_rotary_limits,
    warn_of_warmup,
)
from lisa_dist.training.setup import rows_of


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


def test_a_model_of_ones_own_on_the_demonstrations_data_is_warned_of(caplog):
    warn_of_demonstration(load(["model.path=/models/mine", "data.path=rows.json"]))
    assert caplog.text == ""
    warn_of_demonstration(load(["model.path=/models/mine"]))
    assert "the model /models/mine is trained on the demonstration's questions" in caplog.text


def test_the_demonstration_begins_without_a_warning(caplog):
    config = load([])
    warn_of_demonstration(config)
    warn_of_positions(config.data.sequence_length, read_architecture(config.model))
    assert caplog.text == ""


def test_rows_across_a_limit_of_rotary_frequencies_are_told(caplog):
    built = Qwen3Config(max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    for lengths, told in (([20, 32], ""), ([33, 40], ""), ([20, 33, 20], "1 of 3 rows have more than 32 tokens, and")):
        columns = {"input_ids": [[1]] * len(lengths), "labels": [[1]] * len(lengths), "length": lengths}
        warn_of_rotary_limits(Sequences(datasets.Dataset.from_dict(columns)), built, grouped=False)
        assert caplog.text == "" if not told else told in caplog.text
    assert caplog.text.endswith("data.group_by_length=true most of them\n")
    warn_of_rotary_limits(Sequences(datasets.Dataset.from_dict(columns)), built, grouped=True)
    assert caplog.text.endswith("data.group_by_length=true not all of them\n")


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
