"""What a run notes of its model when it starts is what an export holds: the source's own fields, code and settings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lisa_dist.checkpoint import description
from lisa_dist.checkpoint.description import (
    described_model,
    generation_fields,
    repaired,
    write_description,
    write_tokenizer,
)
from lisa_dist.checkpoint.export import export_checkpoint, find_checkpoint
from lisa_dist.config import Config, ModelConfig, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import read_architecture
from lisa_dist.models.inspection import pretrained_architecture
from lisa_dist.planning.simulation import architecture_of
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.training import setup as preparation
from tests.support.families import tiny_config
from tests.support.runs import Kill, make_run, train

CONFIGURATION = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .naming import NAME

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    name = NAME
"""
ENDS = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def make_model(directory: Path, family: str = "llama", **fields: Any) -> dict[str, torch.Tensor]:
    """Write a tiny model with the demonstration's vocabulary and further fields of config.json; return its tensors."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family, vocab_size=1024, max_position_embeddings=512)).save_pretrained(
        directory
    )
    change_json(directory / "config.json", **fields)
    return load_file(directory / "model.safetensors")


def add_code(directory: Path) -> None:
    """Make a model one of a class of its own."""
    (directory / "configuration_own.py").write_text(CONFIGURATION)
    (directory / "modeling_own.py").write_text(MODELING)
    (directory / "naming.py").write_text("NAME = 'own'\n")
    change_json(directory / "config.json", model_type="own", auto_map=AUTO_MAP, architectures=["OwnForCausalLM"])


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def described(config: Config) -> dict[str, Any]:
    """Write the description of a run that starts now; return the fields of its config.json."""
    write_description(RunDirectory.of(config), config.model, pretrained_architecture(config.model))
    return json.loads((Path(str(config.run.dir)) / "model" / "config.json").read_text())


def test_fields_are_the_sources_own_and_not_those_of_training(tmp_path: Path) -> None:
    make_model(
        tmp_path / "base", "mixtral", use_cache=False, output_router_logits=True, own_note="kept", temperature=0.7
    )
    source = json.loads((tmp_path / "base" / "config.json").read_text())
    config = make_run(tmp_path / "run", tmp_path / "base", "model.attention=eager")
    assert described(config) == {**source, "tie_word_embeddings": False}
    assert read_architecture(described_model(RunDirectory.of(config), config.model)).num_local_experts == 4


def test_the_dtype_is_that_of_the_weights_under_the_name_it_had(tmp_path: Path) -> None:
    tensors = make_model(tmp_path / "base", torch_dtype="float32")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    del fields["dtype"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "base" / "model.safetensors")
    found = described(make_run(tmp_path / "run", tmp_path / "base"))
    assert found["torch_dtype"] == "float16" and "dtype" not in found


def test_a_preset_without_files_is_described_by_its_fields(tmp_path: Path) -> None:
    fields = "{model_type:llama,vocab_size:1024,hidden_size:16,num_hidden_layers:1,num_attention_heads:2}"
    config = make_run(tmp_path / "run", tmp_path, f"model.architecture={fields}", "model.init=random")
    config.model.path = None
    found = described(config)
    assert (found["hidden_size"], found["dtype"], found.get("use_cache", True)) == (16, "bfloat16", True)


def test_generation_settings_are_the_files_or_the_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_model(tmp_path / "base", use_cache=True)
    config = make_run(tmp_path / "run", tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    written = tmp_path / "run" / "model" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 5, "num_return_sequences": 4}))
    described(config)
    assert json.loads(written.read_text()) == {"eos_token_id": 5}
    assert "num_return_sequences=4 is left out" in caplog.text
    file.unlink()
    described(config)
    found = json.loads(written.read_text())
    assert (found["eos_token_id"], found["use_cache"]) == (2, True)
    for text, message in [("{", "no valid JSON"), ("[1]", "must hold a JSON object"), ("", "is empty")]:
        file.write_text(text)
        with pytest.raises(UserError, match=rf"generation_config\.json {message}|generation_config\.json is {message}"):
            described(config)
        assert not (tmp_path / "run" / "model").exists()


def test_code_that_an_export_would_lack_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "base")
    add_code(tmp_path / "base")
    config = make_run(tmp_path / "run", tmp_path / "base", "model.trust_remote_code=true")
    described(config)
    monkeypatch.setattr(description, "copy_code", lambda *_: None)
    with pytest.raises(
        UserError, match=r"base: what an export would hold of it can't be used: .*configuration_own\.py"
    ):
        described(config)


def test_weights_are_looked_at_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(preparation, "prepare_data", lambda *_: pytest.fail("the data was read first"))
    with pytest.raises(UserError, match=r"model\.safetensors is a Git LFS pointer"):
        preparation.prepare_run(make_run(tmp_path / "run", tmp_path / "base"), ParallelDims(1, replicate=1, shard=1))


def test_a_run_without_a_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.dir=.* has no model/config\.json, which a run writes when it starts"):
        described_model(RunDirectory(tmp_path / "run"), ModelConfig(path=str(tmp_path / "base")))


def test_a_plan_has_the_head_of_the_weights(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tensors = make_model(base, "qwen2")
    config = make_run(tmp_path / "run", base)
    assert architecture_of(config.model).tie_word_embeddings is True
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="planned with a head of its own"):
        assert architecture_of(config.model).tie_word_embeddings is False
    (base / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"planned as config\.json says.* is empty"):
        assert architecture_of(config.model).tie_word_embeddings is True


def test_tokenizers_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_run(tmp_path / "run", tmp_path)
    tokenizer = load_tokenizer("builtin:demo")
    marked = "<|marked|>"
    tokenizer.add_special_tokens({"extra_special_tokens": [marked]})
    write_tokenizer(RunDirectory.of(config).tokenizer, config.model, tokenizer)
    assert not caplog.text
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.extra_special_tokens == tokenizer.extra_special_tokens == [marked]
    # transformers 4 has no class TokenizersBackend, and takes extra_special_tokens for a mapping.
    written = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == [marked] and "extra_special_tokens" not in written
    tokenizer.save_pretrained = lambda folder: (_ for _ in ()).throw(ValueError("no vocabulary"))
    with pytest.raises(
        UserError, match=r"model\.tokenizer=builtin:demo: can't be saved for an export \(no vocabulary\)"
    ):
        write_tokenizer(RunDirectory.of(config).tokenizer, config.model, tokenizer)


def test_a_model_with_code_of_its_own_is_exported_whole(tmp_path: Path) -> None:
    make_model(tmp_path / "base")
    add_code(tmp_path / "base")
    config = make_run(tmp_path / "run", tmp_path / "base", "model.trust_remote_code=true", "sampler.active_layers=1")
    train(1, config)
    shutil.rmtree(tmp_path / "base")
    export_checkpoint(config, find_checkpoint(tmp_path / "run" / "checkpoints", None), tmp_path / "hf")
    shutil.rmtree(tmp_path / "run")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (type(again).__name__, again.name) == ("OwnForCausalLM", "own")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"] == AUTO_MAP
    GenerationConfig.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "settings")


def test_a_head_of_its_own_is_trained_resumed_and_exported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """config.json ties it; the head is frozen here, which tied weights would not allow beside trained embeddings."""
    base = tmp_path / "base"
    tensors = make_model(base, "qwen2")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = make_run(
        tmp_path / "run", base, "always_active.head=false", "sampler.active_layers=1", "checkpoint.every=1"
    )
    train(1, config, Kill("before", 2))
    (base / "model.safetensors").unlink()  # a resume reads the weights of the checkpoint
    config.checkpoint.resume = "auto"
    train(1, config)
    export_checkpoint(config, find_checkpoint(tmp_path / "run" / "checkpoints", None), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    with caplog.at_level(logging.WARNING, "transformers"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again.lm_head.weight, tensors["lm_head.weight"])
    assert not torch.equal(again.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["glm4_moe", "ernie4_5_moe"])
def test_what_a_model_does_not_train_itself_is_neither_rounded_nor_trained(family: str, tmp_path: Path) -> None:
    """Biases of routers, a buffer of GLM's and a parameter without gradient of Ernie's: rounded they choose others."""
    base, run = tmp_path / "base", tmp_path / "run"
    tensors = make_model(base, family)
    biases = {name: 7 + 0.2 * torch.rand_like(tensor) for name, tensor in tensors.items() if "correction_bias" in name}
    assert biases
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halved | biases, base / "model.safetensors", metadata={"format": "pt"})
    settings = [
        "precision.frozen=bfloat16",
        "sampler.active_layers=2",
        "optimizer.weight_decay=0.1",
        "train.max_steps=3",
    ]
    config = make_run(run, base, *settings)
    train(1, config)
    assert "rounded to bfloat16" not in (run / "logs" / "rank_0.log").read_text()
    export_checkpoint(config, find_checkpoint(run / "checkpoints", None), tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], bias) for name, bias in biases.items())
    exact = {name for name, tensor in exported.items() if tensor.dtype != torch.bfloat16}
    # What training computes with in float32, and transformers too: routers as a whole.
    assert exact == {*biases, *(name for name in exported if name.endswith("mlp.gate.weight"))}


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        (ENDS, {}),
        ({**ENDS, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "num_return_sequences": 4}, {}),
        ({**ENDS, "their_own_field": {"a": 1}}, {}),
        ({"temperature": 0.9, "top_p": 0.6, **ENDS}, {"temperature": 0.9, "top_p": 0.6}),
        # What allows a setting may follow it.
        ({"temperature": 0.9, "do_sample": True, "max_new_tokens": 0, **ENDS}, {"max_new_tokens": 0}),
        ({**ENDS, "num_return_sequences": 4}, {"num_return_sequences": 4}),
        ({**ENDS, "num_return_sequences": 4, "num_beams": 4}, {}),
        ({**ENDS, "max_new_tokens": 0}, {"max_new_tokens": 0}),
        ({**ENDS, "max_new_tokens": "many"}, {"max_new_tokens": "many"}),
        (
            {**ENDS, "early_stopping": "maybe", "length_penalty": 2.0},
            {"early_stopping": "maybe", "length_penalty": 2.0},
        ),
        ({**ENDS, "cache_implementation": "none_such"}, {"cache_implementation": "none_such"}),
        ({**ENDS, "streamer": "x", "output_scores": True}, {"streamer": "x", "output_scores": True}),
        ({"suppress_tokens": [3], "forced_eos_token_id": 3, **ENDS}, {"forced_eos_token_id": 3}),
    ],
)
def test_only_what_transformers_refuses_is_left_out(
    fields: dict[str, Any], left_out: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    with caplog.at_level(logging.WARNING, "lisa_dist"):
        kept = repaired(fields, "generation_config.json")
    assert list(kept.items()) == [(name, value) for name, value in fields.items() if name not in left_out]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(left_out)
    for name, value in left_out.items():
        assert any(f"{name}={value} is left out" in message for message in said)
    saved = GenerationConfig.from_dict(kept)
    saved.validate(strict=True)
    saved.save_pretrained(tmp_path)


def test_settings_are_found_among_the_fields_of_a_model() -> None:
    fields = {"hidden_size": 48, "temperature": 0.7, "eos_token_id": 2, "pad_token_id": None, "use_cache": False}
    assert generation_fields(fields) == {"temperature": 0.7, "eos_token_id": 2, "use_cache": False}
