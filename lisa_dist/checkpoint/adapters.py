"""LoRA adapters out of a checkpoint: merged into their weights, or by themselves as a PEFT directory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lisa_dist.checkpoint.description import described_model
from lisa_dist.checkpoint.shards import ShardedTensors, write_safetensors
from lisa_dist.checkpoint.state import open_weights
from lisa_dist.config import Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.method.updates.lora import ADAPTER, adapter_config, merge, scaling_of
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.quantization import dequantize

WEIGHTS_FILE = "adapter_model.safetensors"


def merged_tensors(
    tensors: ShardedTensors, adapters: LoraUpdateConfig | None, quantization: str, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of a checkpoint under the name it has without adapters, those with one merged, one at a time.

    Weights that ``model.quantization`` changed are turned into the numbers they stand for, which are those that the
    adapters were trained on. ``model`` is the model without adapters, on ``meta``.
    """

    def plain(name: str) -> torch.Tensor:
        scale = f"{name}_scale"
        if scale not in tensors.pieces:
            return tensors.read(name)
        return dequantize(tensors.read(name), tensors.read(scale), quantization, torch.float32)

    for name in tensors:
        if ".lora_" in name or name.endswith(".weight_scale"):
            continue
        if adapters is None or not name.endswith(".base_layer.weight"):
            yield name.replace(".base_layer.", "."), plain(name)
            continue
        layer = name.removesuffix(".base_layer.weight")
        a, b = (tensors.read(f"{layer}.lora_{kind}.{ADAPTER}.weight") for kind in "AB")
        magnitude = tensors.read(f"{layer}.lora_magnitude_vector.{ADAPTER}.weight") if adapters.dora else None
        transposed = isinstance(model.get_submodule(layer), Conv1D)
        yield f"{layer}.weight", merge(plain(name), a, b, scaling_of(adapters, a.shape[0]), magnitude, transposed)


def write_adapter(config: Config, checkpoint: Path, directory: Path) -> list[str]:
    """Write the adapters of a checkpoint as a directory that peft loads, and return the files of weights.

    Raises:
        UserError: the run has no adapters, more than adapters was trained, or they belong to weights that no file has.
    """
    if config.update.adapters is None:
        raise UserError(f"export.adapter=true: this run has no adapters, its update is {config.update.name}")
    trained = [part for part, trains in asdict(config.always_active).items() if trains]
    if trained:
        raise UserError(
            f"export.adapter=true: trained were also the {', '.join(trained)}; leave the key out to export all, merged"
        )
    if config.model.initialization == "random":
        raise UserError(
            "export.adapter=true: the adapters belong to weights that began at random and are in no file; leave the "
            "key out to export all, merged"
        )
    dtype = getattr(torch, config.export.dtype or "float32")
    tensors = open_weights(checkpoint)
    names = [name for name in tensors if ".lora_" in name]
    described = {_peft_name(name): torch.empty(tensors.shape(name), dtype=dtype, device="meta") for name in names}
    contents = (tensors.read(name).to(dtype) for name in names)
    write_safetensors(described, directory / WEIGHTS_FILE, {"format": "pt"}, contents)
    model = build_meta_model(described_model(RunDirectory.of(config), config.model))
    written = adapter_config(config.update.adapters, find_layers(model, config.model.blocks))
    if put_in_by_peft(written, model) != set(names):
        raise UserError(
            f"export.adapter=true: peft puts the adapters of {type(model).__name__} into other layers where it loads "
            "them; leave the key out to export all, merged"
        )
    base = local_path(str(config.model.path))  # a relative one would be looked for where the adapter is loaded
    written.base_model_name_or_path = str(base.resolve()) if base.is_dir() else config.model.path
    written.inference_mode = True
    written.save_pretrained(str(directory))
    return [WEIGHTS_FILE]


def put_in_by_peft(written: Any, model: nn.Module) -> set[str]:
    """Return the names of the adapters that peft makes of a description: it rewrites those of some mixtures."""
    from peft import inject_adapter_in_model  # takes seconds to import

    with suppress(ValueError):  # which it raises where it can't
        inject_adapter_in_model(copy.deepcopy(written), model, ADAPTER, low_cpu_mem_usage=True)
    return {name for name, _ in model.named_parameters() if ".lora_" in name}


def _peft_name(name: str) -> str:
    """Return the name that a parameter has in PEFT's files: without the adapter's, under a wrapped model."""
    plain = name.replace(f".{ADAPTER}.", ".")
    if ".lora_magnitude_vector." in plain:
        plain = plain.removesuffix(".weight")
    return f"base_model.model.{plain}"
