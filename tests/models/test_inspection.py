"""What is said of a directory's weights before they are read: damage, tensors that do not fit, ties, dtypes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.inspection import pretrained_architecture, ties_differ
from lisa_dist.models.loading import load_pretrained
from tests.support.families import FAMILIES, tiny_config
from tests.support.loaded import allocated

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"


def write_model(directory: Path, family: str = "llama", **changes: object) -> dict[str, torch.Tensor]:
    """Write a tiny model; return its tensors."""
    AutoModelForCausalLM.from_config(tiny_config(family, **changes)).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def split(directory: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Write the tensors as two files and their index; return the files' names."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(tensors)
    parts = [names[::2], names[1::2]]
    for file, part in zip(files, parts):
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_accepted(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family)
    config = ModelConfig(path=str(tmp_path))
    architecture = pretrained_architecture(config)
    assert architecture.dtype == torch.float32
    assert architecture.tie_word_embeddings is tiny_config(family).tie_word_embeddings


def test_a_head_that_differs_is_untied_as_by_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write_model(tmp_path, "qwen2")
    tensors[HEAD] = tensors[EMBEDDINGS] * 2
    rewrite(tmp_path, tensors)
    config = ModelConfig(path=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        architecture = pretrained_architecture(config)
    assert architecture.tie_word_embeddings is False
    assert caplog.text.count(f"{HEAD} differs from {EMBEDDINGS}") == 1
    assert ties_differ(config, tiny_config("qwen2"), tmp_path)
    model = allocated(architecture)
    load_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors[HEAD])
    assert all(torch.equal(model.get_parameter(name), value) for name, value in theirs.named_parameters())


@pytest.mark.parametrize("stored", [[HEAD], [EMBEDDINGS], [HEAD, EMBEDDINGS]])
def test_a_shared_weight_stays_shared(stored: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write_model(tmp_path, "qwen2")
    weight = tensors.pop(EMBEDDINGS)
    rewrite(tmp_path, {**tensors, **{name: weight.clone() for name in stored}})
    with caplog.at_level(logging.WARNING):
        architecture = pretrained_architecture(ModelConfig(path=str(tmp_path)))
    assert architecture.tie_word_embeddings is True and not caplog.text
    model = build_meta_model(ModelConfig(), architecture)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_difference_in_the_last_rows_is_seen(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, "qwen2", vocab_size=5000)  # compared in two parts
    tensors[HEAD] = tensors[EMBEDDINGS].clone()
    tensors[HEAD][-1, -1] += 1
    rewrite(tmp_path, tensors)
    assert pretrained_architecture(ModelConfig(path=str(tmp_path))).tie_word_embeddings is False


def test_a_model_without_ties_and_without_a_head_is_refused(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    del tensors[HEAD]
    rewrite(tmp_path, tensors)
    with pytest.raises(UserError, match=rf"lack {HEAD}; where .* set tie_word_embeddings=true in config\.json"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_tensors_that_do_not_fit_are_named_from_the_headers(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, message in [
        ({name: torch.zeros(3, 3)}, rf"{name} has shape \[3, 3\] in the weights"),
        ({"model.layers.0.extra": torch.zeros(1)}, r"hold the unexpected model\.layers\.0\.extra"),
        ({name: tensors[name].to(torch.float8_e4m3fn)}, rf"{name} is stored as F8_E4M3, which is no plain"),
        ({name: tensors[name].to(torch.int8)}, rf"{name} is stored as I8"),
    ]:
        rewrite(tmp_path, {**tensors, **changed})
        with pytest.raises(UserError, match=message):
            pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_two_tensors_for_one_weight_are_refused_where_they_differ(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    other = name.removeprefix("model.")  # transformers reads that as well
    rewrite(tmp_path, {**tensors, other: tensors[name].clone()})
    pretrained_architecture(ModelConfig(path=str(tmp_path)))
    rewrite(tmp_path, {**tensors, other: tensors[name] + 1})
    with pytest.raises(UserError, match=rf"hold both {other} and {name}, which are {name} alike and differ"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_tensors_that_transformers_leaves_aside_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As for GLM 4 and DeepSeek V3, whose further layers predict the tokens after the next.
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])
    tensors = write_model(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1)}
    rewrite(tmp_path, {**tensors, **computed})
    pretrained_architecture(config)
    assert "does not load" not in caplog.text
    further = {f"model.layers.3.{name}.weight": torch.zeros(1) for name in ("eh_proj", "enorm")}
    rewrite(tmp_path, {**tensors, **computed, **further})
    pretrained_architecture(config)
    assert "hold model.layers.3.eh_proj.weight and 1 more, which transformers does not load" in caplog.text


def test_experts_that_are_not_there_are_missed(tmp_path: Path) -> None:
    tensors = write_model(tmp_path, "qwen3_moe")
    rewrite(tmp_path, {name: tensor for name, tensor in tensors.items() if ".experts.3." not in name})
    with pytest.raises(UserError, match=r"needs 4 experts, found \[3\]"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_rounding_to_the_frozen_dtype_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write_model(tmp_path)
    rewrite(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})
    with caplog.at_level(logging.INFO):
        assert pretrained_architecture(ModelConfig(path=str(tmp_path)), "float32").dtype == torch.float16
        assert not caplog.text
        pretrained_architecture(ModelConfig(path=str(tmp_path)), "bfloat16")
    assert "stored as 100.0% float16, and are rounded to bfloat16" in caplog.text


@pytest.mark.parametrize(
    ("family", "stored", "frozen", "told"),
    [
        ("ernie4_5_moe", torch.float32, "bfloat16", True),
        ("ernie4_5_moe", torch.float32, "float32", False),
        ("ernie4_5_moe", torch.bfloat16, "bfloat16", False),
        ("qwen3_moe", torch.float32, "bfloat16", False),
    ],
)
def test_weights_of_routers_that_transformers_does_not_round_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, stored: torch.dtype, frozen: str, told: bool
) -> None:
    tensors = write_model(tmp_path, family)
    gates = [name for name in tensors if name.endswith("mlp.gate.weight")]
    rest = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    rewrite(tmp_path, {**rest, **{name: tensors[name].to(stored) for name in gates}})
    pretrained_architecture(ModelConfig(path=str(tmp_path)), frozen)
    says = f"transformers uses {gates[0]} and {len(gates) - 1} more in float32"
    assert (says in caplog.text) == told
    if told:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
        assert loaded[gates[0]].dtype == torch.float32 and torch.equal(loaded[gates[0]], tensors[gates[0]])


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text(POINTER), r"is a Git LFS pointer .*git lfs pull"),
        (lambda file: file.write_bytes(b""), r"is empty"),
        (_cut, r"\(\d+ bytes\) is cut short or no safetensors file"),
        (lambda file: file.write_text("<html>404</html>"), r"is cut short or no safetensors file"),
        (lambda file: file.unlink(), r"which is not there"),
    ],
    ids=["pointer", "empty", "cut", "page", "absent"],
)
def test_damaged_files_are_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    file = tmp_path / split(tmp_path, write_model(tmp_path))[1]
    damage(file)
    with pytest.raises(UserError, match=rf"{file.name} .*{message}|{file.name}, {message}") as caught:
        pretrained_architecture(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_an_index_of_other_files_is_refused(tmp_path: Path) -> None:
    files = split(tmp_path, write_model(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    original = json.loads(index.read_text())["weight_map"]
    for weight_map, message in [
        ({**original, EMBEDDINGS: files[0], HEAD: files[0]}, rf"puts \S+ in {files[0]}, which lacks it"),
        ({k: v for k, v in original.items() if k != HEAD}, rf"leaves out {HEAD} of"),
        ({}, "has no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            pretrained_architecture(ModelConfig(path=str(tmp_path)))
    index.write_text(POINTER)
    with pytest.raises(UserError, match=r"index\.json is a Git LFS pointer"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_files_without_an_index(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    files = split(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert pretrained_architecture(ModelConfig(path=str(tmp_path))).dtype == torch.float32
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"both model-00001-of-00002\.safetensors and other\.safetensors hold"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))
    (tmp_path / files[1]).unlink()
    with pytest.raises(UserError, match=rf"{files[0]} is there but not {files[1]}"):
        pretrained_architecture(ModelConfig(path=str(tmp_path)))


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = write_model(tmp_path)
    split(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    rewrite(tmp_path, tensors)
    with caplog.at_level(logging.WARNING):
        architecture = pretrained_architecture(ModelConfig(path=str(tmp_path)))
    assert "the first is read" in caplog.text
    model = allocated(architecture)
    load_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, tensors[HEAD]) and torch.equal(theirs.lm_head.weight, tensors[HEAD])
