"""Packed samples are kept apart by positions, by a mask, or the architecture is refused; each found by trying."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.config import Config, DataConfig, ModelConfig, UserError
from lisa_dist.method.module import separate_packed_samples
from lisa_dist.models import masking
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.masking import check_length_of_rows, find_separation, install_position_handling
from lisa_dist.models.packed_attention import fits_flash
from lisa_dist.models.tiny_copy import NoTinyCopyError, tiny_copy
from lisa_dist.objectives.chunked_head import install_loss_head
from lisa_dist.runtime import distributed
from tests.support.families import FAMILIES, meta_model, tiny_config

# Published sizes, or nearly: what is tried is the tiny copy that the check makes of them.
WITHOUT_POSITIONS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 32},
    "opt": {"hidden_size": 512, "word_embed_proj_dim": 512, "num_attention_heads": 8, "ffn_dim": 2048},
    "bloom": {"hidden_size": 1024, "n_head": 16, "n_layer": 24},
    "mpt": {"d_model": 512, "n_heads": 8, "n_layers": 4, "expansion_ratio": 4},
    "xglm": {"d_model": 512, "attention_heads": 8, "num_layers": 4, "ffn_dim": 2048},
    "biogpt": {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048},
}
RUNNING_ON: dict[str, dict[str, Any]] = {
    "mamba": {},
    "falcon_mamba": {},
    "rwkv": {},
    "recurrent_gemma": {},
    "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [3]},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]},
    "qwen3_next": {"num_hidden_layers": 8},
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "attention"]},
}


def _meta(model_type: str, **fields: Any) -> Any:
    return build_meta_model(ModelConfig(), AutoConfig.for_model(model_type, **fields))


def _separation(model: Any) -> str:
    return find_separation(model, find_layers(model).blocks_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_need_no_more_than_positions_or_borders(family: str) -> None:
    model = meta_model(family)
    assert _separation(model) == "positions"
    if family in ("gemma2", "gpt_oss"):  # soft caps, sinks
        with pytest.raises(UserError, match="has no masks, soft caps or sinks"):
            find_separation(model, find_layers(model).blocks_path, "varlen")
    else:
        assert find_separation(model, find_layers(model).blocks_path, "varlen") == "borders"


@pytest.mark.parametrize(
    ("fields", "kernels", "chosen"),
    [
        ({}, "auto", ("varlen", "borders")),
        ({"attention_dropout": 0.1}, "auto", ("sdpa", "positions")),
        ({}, "compile", ("sdpa", "positions")),
    ],
)
def test_auto_attends_to_packed_samples_without_a_mask(
    fields: dict[str, Any], kernels: str, chosen: tuple[str, str]
) -> None:
    architecture = tiny_config("llama")
    architecture.update(fields)
    model = build_meta_model(ModelConfig(), architecture)
    config = Config(data=DataConfig(packing=True), model=ModelConfig(kernels=kernels))
    separation = separate_packed_samples(config, model, find_layers(model))
    assert (model.config._attn_implementation, separation) == chosen


@pytest.mark.parametrize(
    ("fields", "halved", "installed", "preferred"),
    [
        ({}, True, True, ["varlen", "flash_attention_2", "flex_attention"]),
        ({}, True, False, ["varlen", "flex_attention"]),
        ({}, False, True, ["flex_attention"]),
        ({"head_dim": 512}, True, False, ["flex_attention"]),
        ({"head_dim": 12}, True, False, ["flex_attention"]),
        ({"attention_dropout": 0.1}, True, False, ["flex_attention"]),
    ],
)
def test_kernels_of_a_gpu_are_preferred_in_order(
    fields: dict[str, Any], halved: bool, installed: bool, preferred: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    architecture = tiny_config("llama", head_dim=16)
    architecture.update(fields)
    model: Any = torch.nn.Module()
    model.config = architecture
    assert masking.kernels_without_mask(model, "auto", halved=halved, compiled=False) == preferred


def test_why_a_kernel_is_not_taken_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = meta_model("gemma2")
    with caplog.at_level(logging.INFO):
        assert separate_packed_samples(Config(data=DataConfig(packing=True)), model, find_layers(model)) == "positions"
    (said,) = caplog.messages
    assert said.startswith("model.attention=auto: not varlen: ") and "soft caps" in said
    assert "data.packing=false" not in said


@pytest.mark.parametrize("head_size", [80, 96, 128, 100])
def test_heads_of_a_copy_fit_flash_kernels_where_those_of_the_model_do(head_size: int) -> None:
    model = _meta("llama", hidden_size=32 * head_size, num_attention_heads=32, num_hidden_layers=2)
    small = tiny_copy(model, find_layers(model).blocks_path).config
    assert fits_flash(small.head_dim) == fits_flash(head_size)


@pytest.mark.parametrize("model_type", WITHOUT_POSITIONS)
def test_masks_built_without_positions_are_narrowed(model_type: str) -> None:
    assert _separation(_meta(model_type, **WITHOUT_POSITIONS[model_type])) == "mask"


def test_a_model_smaller_than_its_tiny_copy_is_tried_too() -> None:
    fields = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2, "ffn_dim": 16}
    small = _meta("opt", **fields, vocab_size=12, num_hidden_layers=1, max_position_embeddings=16)
    assert _separation(small) == "mask"


@pytest.mark.parametrize("model_type", RUNNING_ON)
def test_state_that_runs_on_is_refused_by_name(model_type: str) -> None:
    model = _meta(model_type, **RUNNING_ON[model_type])
    name = type(model).__name__
    with pytest.raises(UserError, match=rf"data\.packing=true: {name} does not keep .*; use data\.packing=false"):
        _separation(model)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6}


@pytest.mark.parametrize(
    ("model_type", "fields", "limit", "name"),
    [
        ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}, 32, "rope_type=longrope"),
        (
            "llama",
            {
                "max_position_embeddings": 48,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
            48,
            "rope_type=dynamic",
        ),
        ("llama4_text", {"num_hidden_layers": 4, "floor_scale": 64}, 63, "attn_temperature_tuning"),
    ],
)
def test_rows_so_long_that_they_change_a_samples_numbers_are_refused(
    model_type: str, fields: dict[str, Any], limit: int, name: str
) -> None:
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0}
    model = _meta(model_type, **{**shape, **sizes, **fields})
    config = Config(data=DataConfig(packing=True, sequence_length=limit + 1))
    with pytest.raises(UserError, match=rf"rows of more than {limit} tokens .*\({name} of its config.json\)"):
        separate_packed_samples(config, model, find_layers(model))
    config.data.sequence_length = limit
    separate_packed_samples(config, model, find_layers(model))


def test_frequencies_that_are_the_same_for_short_and_long_rows_limit_none() -> None:
    rotary = {**LONGROPE, "short_factor": LONGROPE["long_factor"]}
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    model = _meta("phi3", **sizes, rope_parameters=rotary, original_max_position_embeddings=32)
    check_length_of_rows(model.config, 64)


def test_positions_that_do_not_begin_anew_are_refused() -> None:
    """It counts tokens itself: kept apart by a mask, the second sample still stands where it does not alone."""
    model = _meta("bart", is_decoder=True, is_encoder_decoder=False)
    with pytest.raises(UserError, match="BartForCausalLM does not keep packed samples apart"):
        _separation(model)


def test_what_can_not_be_tried_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NoTinyCopyError("it would have 7,000,000,000 parameters")

    monkeypatch.setattr(masking, "tiny_copy", fail)
    with pytest.raises(UserError, match=r"LlamaForCausalLM .* can't be tried.*7,000,000,000.*data\.packing=false"):
        _separation(meta_model("llama"))


def test_a_copy_in_which_no_token_sees_another_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*args: Any) -> Any:
        copy = tiny_copy(*args)
        for name, parameter in copy.named_parameters():
            if "o_proj" in name:
                torch.nn.init.zeros_(parameter)
        return copy

    monkeypatch.setattr(masking, "tiny_copy", blind)
    with pytest.raises(UserError, match="no token sees another"):
        _separation(meta_model("llama"))


def test_tiny_copy_has_every_kind_of_block_and_few_parameters() -> None:
    state = torch.get_rng_state()
    model = _meta("qwen3_next")
    copy = tiny_copy(model, "model.layers")
    assert len(copy.model.layers) == 4 < len(model.model.layers)  # the fourth is the first of full attention
    assert sum(parameter.numel() for parameter in copy.parameters()) < 10**6
    assert torch.equal(torch.get_rng_state(), state)


_GPT_OSS = {"num_local_experts": 4, "sliding_window": 4, "head_dim": 16}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 48, "dropout": 0.0}


@pytest.mark.parametrize(
    ("model_type", "fields", "kernel"),
    [
        ("gpt_oss", _GPT_OSS, "eager"),
        ("opt", _OPT, "eager"),
        ("opt", _OPT, "sdpa"),
        ("opt", _OPT, "varlen"),
        ("mistral", {"sliding_window": 4}, "varlen"),
    ],
)
def test_packed_loss_and_gradients_are_those_of_the_samples_alone(
    model_type: str, fields: dict[str, Any], kernel: str
) -> None:
    """Through the chunked loss, as in training, with padding, several samples a row and a window shorter than them."""
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(model_type, **{**shape, "num_hidden_layers": 2, "pad_token_id": 0, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    install_loss_head(model, find_layers(model), chunk_tokens=16)
    install_position_handling(model, "borders" if kernel == "varlen" else "mask")
    samples = [torch.randint(3, 64, (size,)) for size in (9, 6, 11, 5, 8)]

    def loss_of(row: list[torch.Tensor], padded: int) -> torch.Tensor:
        ids = torch.nn.functional.pad(torch.cat(row), (0, padded))[None]
        labels = torch.cat([torch.cat([torch.tensor([-100]), sample[1:]]) for sample in row])
        labels = torch.nn.functional.pad(labels, (0, padded), value=-100)[None]
        sizes = [len(sample) for sample in row]
        sizes[-1] += padded
        positions = torch.cat([torch.arange(size) for size in sizes])[None]
        borders = torch.tensor([0, *sizes, 0]).cumsum(0).int()  # the last border twice, as in training
        return model(input_ids=ids, labels=labels, position_ids=positions, cu_seqlens=borders)

    loss_of(samples, 7).backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss = loss_of(samples, 7).item()
    model.zero_grad()
    alone = [loss_of([sample], 0) for sample in samples]
    sum(alone).backward()  # type: ignore[union-attr]
    assert loss == pytest.approx(sum(alone).item(), rel=1e-5)  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 1}),  # takes no positions
        (
            "roberta",
            {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "is_decoder": True},
        ),  # from 2
    ],
)
def test_an_unpacked_model_counts_in_its_own_way(model_type: str, fields: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    ids = torch.arange(10, 22)[None]
    expected = model(input_ids=ids).logits
    install_position_handling(model, None)
    torch.testing.assert_close(model(input_ids=ids, position_ids=torch.arange(12)[None]).logits, expected)


def test_a_dense_mask_is_announced_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    model = _meta("opt", hidden_size=64, word_embed_proj_dim=64, num_attention_heads=4, ffn_dim=64)
    config = Config(data=DataConfig(packing=True, sequence_length=1000), model=ModelConfig(attention="sdpa"))
    config.train.micro_batch_size = 2
    with caplog.at_level(logging.INFO):
        assert separate_packed_samples(config, model, find_layers(model)) == "mask"
    assert "OPTForCausalLM" in caplog.text and "2 M entries" in caplog.text
    config.data.packing = False
    assert separate_packed_samples(config, _meta("mamba"), find_layers(model)) is None  # nothing is tried


def test_no_kernel_of_a_gpu_is_tried_where_there_is_no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    model: Any = torch.nn.Module()
    model.config = AutoConfig.for_model("mamba")
    assert masking.kernels_without_mask(model, "auto", halved=True, compiled=False) == []
