"""A checkpoint as a Hugging Face directory, streamed: at most one file's worth of tensors is held at a time."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lisa_dist.checkpoint.adapters import merged_tensors, write_adapter
from lisa_dist.checkpoint.description import GENERATION_FILE, add_ends, described_model, set_dtype
from lisa_dist.checkpoint.manifest import check_format, checkpoint_name, list_checkpoints, step_of, verify
from lisa_dist.checkpoint.shards import write_safetensors
from lisa_dist.checkpoint.state import open_weights
from lisa_dist.config import Config, UserError
from lisa_dist.config.paths import MODEL_CONFIG, check_is_new
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import build_meta_model, read_architecture
from lisa_dist.models.conversion import export_conversion
from lisa_dist.models.inspection import is_used_exactly
from lisa_dist.models.weight_files import INDEX_FILE, SINGLE_FILE
from lisa_dist.runtime.files import new_folder, read_json_object, write_json_object

logger = logging.getLogger(__name__)

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def find_checkpoint(directory: Path, step: int | None, key: str = "export.step") -> Path:
    """Return the checkpoint of ``step``, or the newest complete one; later ones that are damaged are named in the log.

    Args:
        directory: the folder of a run's checkpoints.
        step: optimizer steps done; None: the most.
        key: the configuration key that ``step`` came from, for messages.

    Raises:
        UserError: there is none, or the one asked for is damaged or of another format.
    """
    found = list_checkpoints(directory)
    steps = ", ".join(str(step_of(path)) for path in reversed(found)) or "none"
    if step is not None:
        chosen = directory / checkpoint_name(step)
        if chosen not in found:
            raise UserError(f"{key}={step}: {directory} has no checkpoint of that step; it has {steps}")
        check_format(chosen)
        wrong = verify(chosen)
        if wrong is not None:
            raise UserError(f"{key}={step}: the checkpoint {chosen} is damaged: {wrong}")
        return chosen
    for candidate in found:
        check_format(candidate)
        wrong = verify(candidate)
        if wrong is None:
            return candidate
        logger.warning("checkpoint %s is passed over: %s", candidate, wrong)
    raise UserError(f"run.dir={directory.parent}: has no complete checkpoint (steps found: {steps})")


def parse_size(text: str) -> int:
    """Return bytes from ``5GB``, ``500MB`` or a plain number; :class:`UserError` for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = match[2].upper() if match else ""
    if match is None or (unit and unit not in UNITS):
        raise UserError(f"export.max_shard_size={text}: must be a size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * UNITS.get(unit, 1)))


def export_checkpoint(config: Config, checkpoint: Path, target: Path) -> list[str]:
    """Write ``checkpoint`` to ``target`` as a directory that transformers loads, and return the files of weights.

    Raises:
        UserError: ``target`` holds something already, or can't be written.
    """
    check_is_new(target, "export.path")
    write = write_adapter if config.export.adapter else write_model
    try:
        with new_folder(target) as unfinished:
            files = write(config, checkpoint, unfinished)
            shutil.copytree(RunDirectory.of(config).tokenizer, unfinished, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"export.path={target}: can't be written ({error.strerror or error})") from error
    return files


def write_model(config: Config, checkpoint: Path, directory: Path) -> list[str]:
    """Write weights, adapters merged into them, and what the run noted of its model; return the files of weights."""
    run = RunDirectory.of(config)
    described = described_model(run, config.model)
    model = build_meta_model(described, read_architecture(described))
    shutil.copytree(str(described.path), directory, dirs_exist_ok=True)
    generation = read_json_object(directory / GENERATION_FILE, f"run.dir={config.run.dir}")
    add_ends(generation, load_tokenizer(str(run.tokenizer), config.model.trust_remote_code))
    write_json_object(generation, directory / GENERATION_FILE)
    fields = read_json_object(directory / MODEL_CONFIG, f"run.dir={config.run.dir}")
    if config.export.dtype is not None:
        set_dtype(fields, getattr(torch, config.export.dtype))
    dtype = getattr(torch, fields.get("dtype") or fields["torch_dtype"])
    to_checkpoint = export_conversion(model)
    merged = merged_tensors(open_weights(checkpoint), config.update.adapters, config.model.quantization, model)
    exact = {name for name, _ in model.named_buffers()}  # training rounds none, as the biases that choose experts
    if config.precision.compute == "float32":  # else they were used as rounded
        exact |= {name for name, _ in model.named_parameters() if is_used_exactly(model, name)}
    stream = (
        pair
        for name, tensor in merged
        for pair in to_checkpoint(name, tensor if name in exact else as_dtype(name, tensor, dtype))
    )
    files = write_files(stream, directory, parse_size(config.export.max_shard_size))
    fields["architectures"] = [type(model).__name__]
    write_json_object(fields, directory / MODEL_CONFIG)
    return files


def as_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in ``dtype``; raise :class:`UserError` where a number of it would become infinite."""
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool((cast.isinf() & tensor.isfinite()).any()):
        raise UserError(
            f"export.dtype=float16: {name} holds numbers up to {float(tensor.abs().max()):.3g}, which are infinite in "
            "float16; use export.dtype=bfloat16 or float32"
        )
    return cast


def write_files(stream: Iterator[tuple[str, torch.Tensor]], directory: Path, limit: int) -> list[str]:
    """Write tensors to files of at most ``limit`` bytes (one tensor at least) and their index; return the names."""
    parts: list[list[str]] = []  # the tensors of each file
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        write_safetensors(held, directory / f"part-{len(parts)}", {"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, tensor in stream:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > limit:
            flush()
        held[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    files = [SINGLE_FILE]
    if len(parts) > 1:
        files = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        weight_map = {name: file for file, names in zip(files, parts) for name in names}
        write_json_object({"metadata": {"total_size": total}, "weight_map": weight_map}, directory / INDEX_FILE)
    for number, file in enumerate(files):  # whose names say how many there are
        (directory / f"part-{number}").rename(directory / file)
    return files
