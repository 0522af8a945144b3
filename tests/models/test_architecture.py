"""Which configuration a model is built from, and what is said where there is none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.config.paths import model_directory
from lisa_dist.models.architecture import build_meta_model, meta_replica, read_architecture, set_depth
from tests.support.families import meta_model, tiny_config

TINY = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def _write(directory: Path, fields: dict) -> str:
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


def test_directory_comes_before_the_presets_fields(tmp_path: Path) -> None:
    tiny_config("llama", use_cache=True).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), architecture=TINY, attention="eager")
    architecture = read_architecture(config)
    assert architecture.hidden_size == 48
    assert architecture.use_cache is False
    assert architecture._attn_implementation == "eager"


def test_fields_stand_in_for_a_hub_id_where_no_weights_are_read() -> None:
    config = ModelConfig(path="somebody/model", architecture=TINY)
    assert read_architecture(config, without_weights=True).hidden_size == 32
    assert read_architecture(ModelConfig(path="somebody/model", init="random", architecture=TINY)).hidden_size == 32


def test_built_in_model_is_in_the_package() -> None:
    directory = model_directory("builtin:demo")
    assert directory is not None and (directory / "config.json").is_file()
    with pytest.raises(UserError, match="builtin:demo"):
        model_directory("builtin:dmeo")


def test_model_is_on_meta_in_float32(tmp_path: Path) -> None:
    tiny_config("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = build_meta_model(ModelConfig(path=str(tmp_path)))
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}
    replica = meta_replica(model)
    assert {n: p.shape for n, p in replica.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_language_model_of_several_modalities_is_refused(tmp_path: Path) -> None:
    text = tiny_config("gemma3").to_dict()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    AutoConfig.for_model("gemma3", text_config=text, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model_type=gemma3 is .*\(text_config, vision_config\).* text-only model"):
        read_architecture(ModelConfig(path=str(tmp_path)))
    tiny_config("gemma3").save_pretrained(tmp_path)
    assert read_architecture(ModelConfig(path=str(tmp_path))).num_hidden_layers == 4


@pytest.mark.parametrize(
    ("model_type", "parts"),
    [
        ("git", "vision_config"),  # the other modality stands beside the text model's own fields
        ("phi4_multimodal", "audio_config, vision_config"),
        ("fuyu", "text_config"),
        ("llama4", "text_config, vision_config"),
        ("llava", "text_config, vision_config"),
    ],
)
def test_other_modalities_are_named(model_type: str, parts: str) -> None:
    with pytest.raises(UserError, match=rf"model_type={model_type} is a language model and more \({parts}\)"):
        read_architecture(ModelConfig(architecture={"model_type": model_type}))


def test_nested_fields_of_a_text_model_are_no_other_modality() -> None:
    for model_type in ("mpt", "dbrx"):
        assert read_architecture(ModelConfig(architecture={"model_type": model_type})).model_type == model_type


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    for fields in ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantization_config": {}}):
        path = _write(tmp_path, {**TINY, **fields})
        if fields["quantization_config"]:
            with pytest.raises(UserError, match=r"stored quantised \(quantization_config of config\.json: gptq\)"):
                read_architecture(ModelConfig(path=path))
        else:
            assert read_architecture(ModelConfig(path=path)).hidden_size == 32


def test_attention_kernel_is_the_models_own_choice_unless_named() -> None:
    assert meta_model("llama").config._attn_implementation == "sdpa"
    assert meta_model("gemma2").config._attn_implementation == "eager"
    with pytest.raises(UserError, match=r"model\.attention=sdpa: this model has no such kernel"):
        build_meta_model(ModelConfig(attention="sdpa"), tiny_config("gemma2"))


def test_router_outputs_are_off() -> None:
    fields = tiny_config("mixtral", output_router_logits=True).to_dict()
    assert read_architecture(ModelConfig(architecture=fields)).output_router_logits is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(), r"model\.path=null: name a Hugging Face directory"),
        (ModelConfig(path="/no/such/place"), r"model\.path=/no/such/place: no such directory"),
        (ModelConfig(path="./place"), r"model\.path=\./place: no such directory"),
        (ModelConfig(architecture={"model_type": "lama"}), r"model_type=lama: unknown to .*did you mean llama\?"),
        (
            ModelConfig(path="a", architecture=TINY, attention="flash_attention_2"),
            r"model\.attention=flash_attention_2",
        ),
    ],
)
def test_mistakes_are_named(config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_meta_model(config, read_architecture(config, without_weights=True))


def test_directory_without_or_with_a_broken_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_architecture(ModelConfig(path=str(tmp_path)))
    for text, message in [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", r"config\.json is a Git LFS pointer"),
        ("", r"config\.json is empty"),
        ("[]", r"config\.json must hold a JSON object, but holds a list"),
        (json.dumps({**TINY, "hidden_size": "wide"}), r"config\.json can't be used \(.*hidden_size"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_architecture(ModelConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"unknown to transformers.*did you mean mistral"):
        read_architecture(ModelConfig(path=_write(tmp_path, {"model_type": "mistrall"})))


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path=nobody/nothing: no such directory, and the hub") as caught:
        read_architecture(ModelConfig(path="nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path, {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}})
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(UserError, match=r"model\.trust_remote_code=true"):
        read_architecture(ModelConfig(path=path))
    with caplog.at_level(logging.WARNING):
        architecture = read_architecture(ModelConfig(path=path, trust_remote_code=True))
    assert architecture.model_type == "own"
    assert "RUNS ON THIS MACHINE" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, r"model_type=bert is an encoder, .*is_decoder=true"),
        ({"model_type": "roberta", "is_decoder": False}, "model_type=roberta is an encoder"),
        ({"model_type": "xlm"}, "model_type=xlm is an encoder, .*causal=true"),
        ({"model_type": "xlnet"}, "model_type=xlnet is an encoder, .*attn_type=uni"),
        ({"model_type": "cpmant"}, "model_type=cpmant is an encoder, or like one"),
        ({"model_type": "modernbert"}, "model_type=modernbert is an encoder"),
        ({"model_type": "t5"}, "model_type=t5 is an encoder-decoder"),
        ({"model_type": "bart"}, "model_type=bart is an encoder-decoder"),
        ({"model_type": "whisper"}, "model_type=whisper is an encoder-decoder"),
        ({"model_type": "vit"}, "model_type=vit is a vision model"),
        ({"model_type": "wav2vec2"}, "model_type=wav2vec2 is a speech model"),
    ],
)
def test_what_is_no_decoder_is_named_as_what_it_is(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^model.architecture: {message}"):
        read_architecture(ModelConfig(architecture=fields))
    with pytest.raises(UserError, match=message):
        read_architecture(ModelConfig(path=_write(tmp_path, fields)))


def test_a_decoder_of_an_encoders_type_is_built(tmp_path: Path) -> None:
    fields = {"model_type": "bert", "is_decoder": True, "num_hidden_layers": 1}
    config = ModelConfig(path=_write(tmp_path, fields))
    assert type(build_meta_model(config)).__name__ == "BertLMHeadModel"


def test_fields_that_a_model_can_not_be_built_from_are_one_sentence() -> None:
    architecture = {"model_type": "hunyuan_v1_dense", "head_dim": None}
    with pytest.raises(UserError, match=r"model_type=hunyuan_v1_dense can't be built from its configuration.*TypeErr"):
        build_meta_model(ModelConfig(architecture=architecture))
    with pytest.raises(UserError, match=r"model_type=llama can't have these fields"):
        read_architecture(
            ModelConfig(architecture={"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4})
        )


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_another_depth_lists_as_many_kinds_of_blocks(depth: int) -> None:
    architecture = AutoConfig.for_model("qwen3", num_hidden_layers=4)
    set_depth(architecture, depth)
    again = AutoConfig.for_model(**architecture.to_dict())  # which checks that the two agree
    assert again.num_hidden_layers == len(again.layer_types) == depth
