"""Weights in and out of one process: errors, buffers, random weights and the way back to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils import logging as transformers_logging

from lisa_dist.config import UserError
from lisa_dist.models import weight_files
from lisa_dist.models.conversion import export_conversion
from lisa_dist.models.loading import initialize_random, load_pretrained, restore_buffers
from tests.support.families import FAMILIES, tiny_config
from tests.support.loaded import allocated

transformers_logging.disable_progress_bar()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# The decoder as a whole fills buffers of its blocks, or its own.
FALCON_H1 = {
    **_SMALL,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
FALCON_H1 |= {"ssm_multipliers": [0.5, 2.0, 3.0, 4.0, 5.0]}
GEMMA3N = {
    **_SMALL,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
MODERNBERT = {**_SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GEMMA3N |= {"vocab_size_per_layer_input": 128, "layer_types": ["sliding_attention", "full_attention"]}


def saved(directory: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    """Write a tiny model; return its tensors."""
    AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("family", [*FAMILIES, "llama3_rope", "gemma3_ropes", "falcon_h1", "gemma3n"])
def test_buffers_equal_those_of_a_model_built_the_usual_way(family: str) -> None:
    config = {
        "llama3_rope": lambda: tiny_config("llama", rope_parameters=LLAMA3_ROPE),
        "gemma3_ropes": lambda: tiny_config("gemma3", rope_parameters=GEMMA3_ROPES),
        "falcon_h1": lambda: AutoConfig.for_model("falcon_h1", **FALCON_H1),
        "gemma3n": lambda: AutoConfig.for_model("gemma3n_text", **GEMMA3N),
    }.get(family, lambda: tiny_config(family))()
    expected = dict(AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())
    model = allocated(config)
    restore_buffers(model)
    ours = dict(model.named_buffers())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], buffer) for name, buffer in expected.items())
    if family == "gemma3_ropes":
        assert len({tuple(b.tolist()) for n, b in ours.items() if n.endswith("inv_freq") and "original" not in n}) == 2


def test_buffers_that_are_computed_only_where_a_model_is_built_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by code that comes with a model and was written before transformers 5."""
    model = allocated(tiny_config("llama"))
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(UserError, match=r"LlamaForCausalLM computes model\.rotary_emb\.\w+ where it is built"):
        restore_buffers(model)


@pytest.mark.parametrize("family", [*FAMILIES, "modernbert"])  # whose root and head set what lies within them
def test_random_weights_follow_the_models_own_initialisation(family: str) -> None:
    torch.manual_seed(0)
    modernbert = AutoConfig.for_model("modernbert-decoder", **MODERNBERT, tie_word_embeddings=False)
    config = modernbert if family == "modernbert" else tiny_config(family)
    expected = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = allocated(config)
    initialize_random(model, seed=0)
    for name, parameter in model.named_parameters():
        theirs = expected.get_parameter(name)
        if theirs.std() == 0:  # zeros and ones, of norms and biases
            assert torch.equal(parameter, theirs), name
        else:  # the deviation of n samples has a relative error of about 1 / sqrt(2 n)
            assert parameter.std().item() / theirs.std().item() == pytest.approx(
                1, abs=6 / (2 * theirs.numel()) ** 0.5
            ), name
            assert not torch.equal(parameter, theirs)


def test_parameters_that_are_set_only_where_a_model_is_built_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the activations of Apertus."""
    model = allocated(tiny_config("llama"))
    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda *_: None)
    with pytest.raises(UserError, match=r"model\.init=random: LlamaForCausalLM sets model\..* where it is built"):
        initialize_random(model, 0)


def test_random_weights_depend_on_the_seed_and_differ_between_blocks() -> None:
    states = []
    for seed in (1, 1, 2):
        model = allocated(tiny_config("llama"))
        before = torch.get_rng_state()
        initialize_random(model, seed)
        assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
        states.append(dict(model.named_parameters()))
    weight = "model.layers.{}.self_attn.q_proj.weight"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0][weight.format(0)], states[2][weight.format(0)])
    assert not torch.equal(states[0][weight.format(0)], states[0][weight.format(1)])


def test_adapters_are_left_alone_and_named(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    model = allocated(tiny_config("llama"))
    projection = model.model.layers[0].self_attn
    wrapper = nn.Module()
    wrapper.base_layer, wrapper.lora_A = projection.q_proj, nn.Linear(48, 2, bias=False)
    projection.q_proj = wrapper
    kept = wrapper.lora_A.weight.detach().clone()
    added = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert load_pretrained(model, tmp_path) == [added]
    assert torch.equal(wrapper.base_layer.weight, weights["model.layers.0.self_attn.q_proj.weight"])
    assert initialize_random(model, 0) == [added]
    assert torch.equal(wrapper.lora_A.weight, kept)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    weights = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    for change, message in [
        ({name: None}, rf"the weights lack {name}"),
        ({"model.layers.0.extra": torch.zeros(1)}, r"hold the unexpected model\.layers\.0\.extra"),
        ({name: torch.zeros(3, 3)}, rf"{name} has shape \[3, 3\] in the weights, but \[80, 48\] by config\.json"),
    ]:
        changed = {key: tensor for key, tensor in {**weights, **change}.items() if tensor is not None}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_pretrained(allocated(tiny_config("llama")), tmp_path)


def test_directories_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        load_pretrained(allocated(tiny_config("llama")), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pytorch_model\.bin but no safetensors.*convert it first"):
        load_pretrained(allocated(tiny_config("llama")), tmp_path)


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model\.path=nobody/nothing: can't be downloaded from the hub") as caught:
        load_pretrained(allocated(tiny_config("llama")), "nobody/nothing")
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_the_weights_of_a_hub_id_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(_: str, allow_patterns: list[str], **more: object) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(weight_files, "snapshot_download", download)
    (tmp_path / "config.json").touch()
    assert weight_files.weights_directory("a/b") == tmp_path and "adapter_config.json" in asked
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match=r"^model\.path=a/b: the directory holds an adapter"):
        weight_files.weights_directory("a/b")


def test_tied_weight_is_read_under_either_name(tmp_path: Path) -> None:
    weights = saved(tmp_path, "qwen2")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = allocated(tiny_config("qwen2"))
    load_pretrained(model, tmp_path)
    assert torch.equal(model.model.embed_tokens.weight, weights["lm_head.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_way_back_equals_transformers_own_saving(family: str, tmp_path: Path) -> None:
    """Parameter by parameter, the names and tensors are those that ``save_pretrained`` writes."""
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    to_checkpoint = export_conversion(model)
    ours = dict(
        pair for name, parameter in model.named_parameters() for pair in to_checkpoint(name, parameter.detach())
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    save_file(ours, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.skipif("hrm_text" not in CONFIG_MAPPING_NAMES, reason="newer than this transformers")
def test_one_stored_tensor_may_fill_several_parameters(tmp_path: Path) -> None:
    """A checkpoint that holds projections joined, which transformers splits at load."""
    config = AutoConfig.for_model(
        "hrm_text", **{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) < len(list(model.parameters()))
    loaded = allocated(config)
    load_pretrained(loaded, tmp_path)
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in model.named_parameters())
    to_checkpoint = export_conversion(model)
    ours = dict(
        pair for name, parameter in model.named_parameters() for pair in to_checkpoint(name, parameter.detach())
    )
    save_file(ours, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in model.named_parameters())
