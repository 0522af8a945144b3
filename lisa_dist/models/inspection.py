"""The weights of a directory, looked at before anything else: whole files, the model's tensors, ties, dtypes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.models.architecture import build_meta_model, read_architecture
from lisa_dist.models.conversion import WeightSource, find_sources, join_tied, tied_names
from lisa_dist.models.weight_files import SafetensorsDirectory, weights_directory
from lisa_dist.runtime import distributed

logger = logging.getLogger(__name__)

COMPUTED = re.compile(r"inv_freq$|attn\.bias$|attention\.bias$|masked_bias$|causal_mask$|version$")
ROWS = 4096  # of two tensors that are compared at a time


@dataclass(frozen=True)
class Findings:
    """What the weights say that config.json may not."""

    untied: bool  # config.json ties what differs in the weights
    dtype: torch.dtype  # of most of the weights


def pretrained_architecture(config: ModelConfig, frozen: str = "float32") -> PretrainedConfig:
    """Return the architecture that ``model.*`` names, as its weights have it: its dtype is theirs, and so are its ties.

    All is checked that can be without reading the weights, so that what is wrong with them comes out first. With
    ``model.init=random`` nothing is looked at. ``frozen`` is the dtype in which weights are kept; where that rounds
    them, that is logged. Collective: every rank; the first rank looks, a hub id is downloaded.

    Raises:
        UserError: a file is damaged, or tensors are missing, unexpected, of the wrong shape or kind.
    """
    architecture = read_architecture(config)
    if config.initialization == "random":
        return architecture
    directory = weights_directory(str(config.path))
    findings = distributed.on_rank_zero(lambda: inspect_weights(config, architecture, directory, frozen))
    if findings.untied:
        architecture.tie_word_embeddings = False
    architecture.dtype = findings.dtype
    return architecture


def inspect_weights(config: ModelConfig, architecture: PretrainedConfig, directory: Path, frozen: str) -> Findings:
    """Check the weights of a directory against an architecture, as :func:`pretrained_architecture` says."""
    weights = SafetensorsDirectory(directory)
    weights.check_files()
    replica: Any = build_meta_model(config, architecture)
    sources, unexpected = find_sources(replica, weights.file_of)
    pairs = _different_pairs(replica, sources, weights)
    if pairs:
        replica = _untied_replica(config, architecture, pairs, sources)
        sources, unexpected = find_sources(replica, weights.file_of)
    used = {name for source in sources.values() for name in source.all_names}
    join_tied(replica, sources)
    state = named_state(replica)
    missing = (
        [] if any(_makes_several(source) for source in sources.values()) else sorted(state.keys() - sources.keys())
    )
    check_names(directory, missing, unexpected, _advice(replica, missing))
    for target, source in sources.items():
        _check_source(directory, target, source, state[target], weights)
    _say_unused(directory, set(weights.file_of) - used)
    parameters = dict(replica.named_parameters())
    stored = _stored_dtypes(weights, {target: one for target, one in sources.items() if target in parameters})
    _say_dtypes(directory, stored, getattr(torch, frozen))
    exact = [name for name in parameters if name in sources and is_used_exactly(replica, name)]
    _warn_of_rounded(directory, [name for name in exact if _holds_float32(sources[name], weights)], frozen)
    return Findings(bool(pairs), max(stored, key=lambda dtype: stored[dtype]))


def ties_differ(config: ModelConfig, architecture: PretrainedConfig, directory: Path) -> bool:
    """Whether a directory's weights hold a head of its own where ``architecture`` ties it to the embeddings."""
    weights = SafetensorsDirectory(directory)
    replica = build_meta_model(config, architecture)
    return bool(_different_pairs(replica, find_sources(replica, weights.file_of)[0], weights))


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, each once."""
    persistent = {
        f"{prefix}.{key}" if prefix else key: buffer
        for prefix, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    return {**dict(model.named_parameters()), **persistent}


def check_shape(directory: Path, name: str, found: tuple[int, ...], tensor: Tensor) -> None:
    """Raise :class:`UserError` where a stored tensor has not the shape of the model's."""
    if found != tuple(tensor.shape):
        raise UserError(
            f"model.path={directory}: {name} has shape {list(found)} in the weights, "
            f"but {list(tensor.shape)} by config.json"
        )


def check_experts(directory: Path, name: str, source: WeightSource, tensor: Tensor) -> None:
    """Raise :class:`UserError` where there are not as many experts stored as the model has."""
    counts = {len(names) for names in source.names.values()}
    if counts != {tensor.shape[0]}:
        raise UserError(f"model.path={directory}: {name} needs {tensor.shape[0]} experts, found {sorted(counts)}")


def check_names(directory: Path, missing: list[str], unexpected: list[str], advice: str = "") -> None:
    """Raise :class:`UserError` where tensors are missing, or some have no place in the model."""
    for kind, names in (("lack", missing), ("hold the unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"model.path={directory}: the weights {kind} {', '.join(names[:3])}{more}{advice}")


def _different_pairs(
    replica: Any, sources: dict[str, WeightSource], weights: SafetensorsDirectory
) -> list[tuple[str, str]]:
    """Return the names that the model shares a weight under, where the directory holds two that differ."""
    pairs = [(name, alias) for alias, name in tied_names(replica).items() if name in sources and alias in sources]
    return [(name, alias) for name, alias in pairs if not _are_equal(sources[name].name, sources[alias].name, weights)]


def _are_equal(first: str, second: str, weights: SafetensorsDirectory) -> bool:
    shape = weights.shape(first)
    if first == second:
        return True
    if weights.shape(second) != shape:
        return False
    regions = [(slice(start, start + ROWS),) for start in range(0, shape[0], ROWS)]
    return all(torch.equal(weights.read(first, rows).float(), weights.read(second, rows).float()) for rows in regions)


def _untied_replica(
    config: ModelConfig, architecture: PretrainedConfig, pairs: list[tuple[str, str]], sources: dict[str, WeightSource]
) -> Any:
    """Return the model with nothing tied, and log it."""
    name, alias = pairs[0]
    differs = f"{sources[alias].name} differs from {sources[name].name} in the weights, though config.json ties them"
    architecture.tie_word_embeddings = False
    replica = build_meta_model(config, architecture)
    still = tied_names(replica)
    if any(other in still for _, other in pairs):
        raise UserError(
            f"model.path={config.path}: {differs}, and this architecture can't be built untied; remove one of the two"
        )
    logger.warning(
        "model.path=%s: %s (tie_word_embeddings=true): both are kept and trained as two, as transformers loads them; "
        "the config.json of an export says tie_word_embeddings=false",
        *(config.path, differs),
    )
    return replica


def _advice(replica: Any, missing: list[str]) -> str:
    """Say what helps where a model without tied weights has no head in its directory."""
    head = replica.get_output_embeddings()
    names = {id(parameter): name for name, parameter in replica.named_parameters()}
    if head is None or missing != [names.get(id(head.weight))]:
        return ""
    return "; where the head is to be the embeddings, set tie_word_embeddings=true in config.json"


def _makes_several(source: WeightSource) -> bool:
    """Whether a conversion makes several parameters, of which the source is found under the first one's name."""
    return source.converter is not None and len(source.converter.target_patterns) > 1


def _check_source(
    directory: Path, target: str, source: WeightSource, tensor: Tensor, weights: SafetensorsDirectory
) -> None:
    plain = source.names.get("", [])  # those that need no conversion, of which there can be one, and nothing else
    others = [name for name in source.all_names if name not in plain[:1]]
    differing = next((other for other in others if plain and not _are_equal(plain[0], other, weights)), None)
    if differing is not None:
        raise UserError(
            f"model.path={directory}: the weights hold both {plain[0]} and {differing}, which are {target} alike and "
            "differ; remove the wrong one"
        )
    if source.converter is None:
        check_shape(directory, target, weights.shape(source.name), tensor)
    elif source.by_expert:
        check_experts(directory, target, source, tensor)
    if not tensor.is_floating_point():
        return
    for name in source.all_names:
        if not weights.dtype(name).is_floating_point:
            raise UserError(
                f"model.path={directory}: {name} is stored as {weights.stored_type(name)}, which is no plain "
                "floating-point weight; choose weights in bfloat16, float16 or float32"
            )


def _say_unused(directory: Path, names: set[str]) -> None:
    """Log the tensors that transformers leaves aside, but for what it computes itself: masks and frequencies."""
    unused = sorted(name for name in names if not COMPUTED.search(name))
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        logger.warning(
            "model.path=%s: the weights hold %s%s, which transformers does not load (as layers that predict further "
            "tokens): not trained, and not in an export",
            *(directory, unused[0], more),
        )


def _stored_dtypes(weights: SafetensorsDirectory, sources: dict[str, WeightSource]) -> Counter[torch.dtype]:
    """Count the numbers of each floating-point dtype that the model is filled with."""
    sizes: Counter[torch.dtype] = Counter()
    for source in sources.values():
        for name in source.all_names:
            dtype = weights.dtype(name)
            if dtype.is_floating_point:
                sizes[dtype] += torch.Size(weights.shape(name)).numel()
    return sizes


def _say_dtypes(directory: Path, stored: Counter[torch.dtype], kept: torch.dtype) -> None:
    rounded = [dtype for dtype in stored if torch.promote_types(dtype, kept) != kept]
    if rounded:
        names = ", ".join(
            f"{stored[dtype] / stored.total():.1%} {str(dtype).removeprefix('torch.')}" for dtype in stored
        )
        kind = str(kept).removeprefix("torch.")
        logger.info(
            "model.path=%s: the weights are stored as %s, and are rounded to %s where they are frozen "
            "(precision.frozen)",
            *(directory, names, kind),
        )


def is_used_exactly(replica: Any, name: str) -> bool:
    """Whether transformers uses a parameter in float32 where it loads the rest in bfloat16, as weights of routers."""
    return any(re.search(re.escape(pattern), name) for pattern in replica._keep_in_fp32_modules_strict or ())


def _holds_float32(source: WeightSource, weights: SafetensorsDirectory) -> bool:
    return any(weights.dtype(name) == torch.float32 for name in source.all_names)


def _warn_of_rounded(directory: Path, exact: list[str], kept: str) -> None:
    if exact and kept != "float32":
        more = f" and {len(exact) - 1} more" if len(exact) > 1 else ""
        logger.warning(
            "model.path=%s: transformers uses %s%s in float32, as stored, whatever the rest is in; here they are "
            "rounded to %s, so that the model computes something else (a router may choose other experts); "
            "precision.frozen=float32 with precision.compute=float32 keeps them",
            *(directory, exact[0], more, kept),
        )
