"""LoRA adapters out of a checkpoint: merged into their weights, or by themselves as a PEFT directory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers.pytorch_utils import Conv1D

from lisa_dist.checkpoint.description import described_model
from lisa_dist.checkpoint.shards import ShardedTensors, write_safetensors
from lisa_dist.checkpoint.state import open_weights
from lisa_dist.config import Config, UserError
from lisa_dist.config.paths import model_directory
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.method.updates.lora import ADAPTER, adapter_config, merge, scaling_of
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.conversion import find_sources, join_tied
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.quantization import dequantize
from lisa_dist.models.weight_files import SafetensorsDirectory

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
ROWS = 16  # of each weight that are compared with those of the base


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
        UserError: the run has no adapters, more than adapters was trained, or they belong to weights that no file has,
            or that ``model.path`` no longer has.
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
    tensors, model = open_weights(checkpoint), build_meta_model(described_model(RunDirectory.of(config), config.model))
    base = name_of_base(str(config.model.path), tensors, model)
    names = [name for name in tensors if ".lora_" in name]
    dtype = getattr(torch, config.export.dtype or "float32")
    described = {_peft_name(name): torch.empty(tensors.shape(name), dtype=dtype, device="meta") for name in names}
    contents = (tensors.read(name).to(dtype) for name in names)
    write_safetensors(described, directory / WEIGHTS_FILE, {"format": "pt"}, contents)
    written = adapter_config(config.update.adapters, find_layers(model, config.model.blocks))
    if put_in_by_peft(written, model) != set(names):
        raise UserError(
            f"export.adapter=true: peft puts the adapters of {type(model).__name__} into other layers where it loads "
            "them; leave the key out to export all, merged"
        )
    written.base_model_name_or_path = base
    written.inference_mode = True
    written.save_pretrained(str(directory))
    return [WEIGHTS_FILE]


def name_of_base(path: str, tensors: ShardedTensors, model: nn.Module) -> str:
    """Return how adapters name the directory or hub id of their base: a relative path would be looked for elsewhere.

    Raises:
        UserError: it holds other weights by now than the checkpoint.
    """
    directory = base = None
    with suppress(UserError, OSError, ValueError):  # the last one of a text that is no hub id either
        directory = model_directory(path)
        base = directory or Path(snapshot_download(path, local_files_only=True))
    if base is None or not any(base.glob("*.safetensors")):
        logger.warning(
            "export.adapter=true: no weights of model.path=%s are found from here, so whether they are still those "
            "that the adapters were trained on is not known; the adapter names its base as it is written",
            path,
        )
    elif other := other_weight(tensors, base, model):
        raise UserError(
            f"export.adapter=true: model.path={path} holds other weights than those that the adapters were trained on "
            f"({other} differs); name by model.path where these are, or leave the key out to export all, merged"
        )
    return path if directory is None else str(directory.resolve())


def other_weight(tensors: ShardedTensors, base: Path, model: nn.Module) -> str | None:
    """Return the name of a weight of which a directory has other numbers than a checkpoint, None where there is none.

    The first rows of each are compared, of what is kept as a directory has it: neither quantised nor joined.
    """
    weights = SafetensorsDirectory(base)
    sources, _ = find_sources(model, weights.file_of)
    join_tied(model, sources)
    for name in tensors:
        source = sources.get(name.replace(".base_layer.", "."))
        if source is None or source.converter is not None or f"{name}_scale" in tensors.pieces:
            continue
        kept = tensors.read(name)
        rows = (slice(ROWS),) if kept.dim() else ()
        same_shape = weights.shape(source.name) == tuple(kept.shape)
        if not same_shape or not torch.equal(weights.read(source.name, rows).to(kept.dtype), kept[rows]):
            return source.name
    return None


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
