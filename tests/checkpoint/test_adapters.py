"""Exported adapters and merged models, loaded by peft and transformers, answer as the trained model does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lisa_dist.checkpoint.export import export_checkpoint, find_checkpoint
from lisa_dist.checkpoint.state import open_weights
from lisa_dist.config import Config, UserError
from lisa_dist.method.updates import build_update
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.quantization import quantize_linears
from tests.support.families import tiny_config
from tests.support.runs import make_run, train

IDS = torch.arange(3, 30)[None]


def make_base(directory: Path, family: str) -> Path:
    architecture = tiny_config(family, vocab_size=1024, max_position_embeddings=512, n_positions=512)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(directory)
    return directory


def trained_logits(config: Config, checkpoint: Path) -> torch.Tensor:
    """The logits of the model as it was trained, adapters beside their weights, from the checkpoint's tensors."""
    model = build_adapted(config)
    tensors = open_weights(checkpoint)
    model.load_state_dict({name: tensors.read(name) for name in tensors}, strict=False, assign=True)
    model.tie_weights()
    return model(input_ids=IDS).logits


def build_adapted(config: Config) -> torch.nn.Module:
    """The model with its adapters on the CPU, without any sharding."""
    model = build_meta_model(config.model)
    layers = find_layers(model)
    build_update(config.update).prepare_model(model, layers)
    if config.model.quantization != "none":
        quantize_linears(layers.blocks, config.model.quantization)
    plain = AutoModelForCausalLM.from_pretrained(str(config.model.path))
    model.to_empty(device="cpu")
    for name, buffer in plain.named_buffers():
        model.get_buffer(name).copy_(buffer)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        pytest.param(  # each of its keys is in another case too
            "llama",
            ["method=lora", "update.rank=3", "update.target_modules=[q_proj,down_proj]"],
            marks=pytest.mark.soak,
        ),
        ("llama", ["method=lora", "update.dora=true", "update.rslora=true"]),
        ("gpt2", ["method=lora_fa", "update.rank=3"]),
        ("llama", ["method=lora", "model.quantization=int8", "update.target_modules=[q_proj,down_proj]"]),
    ],
)
@torch.no_grad()
def test_both_exports_answer_as_the_trained_model(family: str, overrides: list[str], tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    config = make_run(tmp_path / "run", base, "optimizer.lr=0.05", *overrides)
    train(1, config)
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints", None)
    expected = trained_logits(config, checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert not torch.allclose(expected, plain(input_ids=IDS).logits, atol=1e-2), "training changed nothing"
    # An adapter is loaded onto weights that are not quantised.
    tolerance = 1e-4 if config.model.quantization == "none" else 0.1

    config.export.dtype = "float32"
    export_checkpoint(config, checkpoint, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)

    config.export.adapter = True
    config.model.path = os.path.relpath(base)  # which the adapter's directory is not read from
    umask = os.umask(0o027)
    export_checkpoint(config, checkpoint, tmp_path / "adapter")
    os.umask(umask)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "config.json" not in names
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, rtol=tolerance, atol=tolerance)


def test_a_base_that_is_another_by_now_is_refused_and_one_that_is_gone_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", "llama")
    config = make_run(tmp_path / "run", base, "method=lora", "precision.frozen=bfloat16", "export.adapter=true")
    train(1, config)
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints", None)
    export_checkpoint(config, checkpoint, tmp_path / "of the same")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.1  # as a further training that was exported there
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"holds other weights than .* \(model.layers.1.mlp.up_proj.weight differs\)"):
        export_checkpoint(config, checkpoint, tmp_path / "of another")
    shutil.rmtree(base)
    export_checkpoint(config, checkpoint, tmp_path / "of none")
    assert f"no weights of model.path={base} are found from here" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lisa"], "export.adapter=true: this run has no adapters, its update is full_rank"),
        (["method=lora", "always_active.norm=true"], "export.adapter=true: trained were also the norm"),
        (["method=lora", "model.init=random"], "export.adapter=true: the adapters belong to weights that began at"),
    ],
)
def test_what_is_no_adapter_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", tmp_path, *overrides, "export.adapter=true")
    with pytest.raises(UserError, match=message):
        export_checkpoint(config, tmp_path, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
