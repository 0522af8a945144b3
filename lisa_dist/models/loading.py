"""Weights into a sharded model, each rank reading or making only what it keeps.

The model is built on meta, sharded and allocated (uninitialised) by then. Parameters that were added to the
architecture (adapters) are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily  # has no public name up to torch 2.13
from transformers import PreTrainedModel

from lisa_dist.config import UserError
from lisa_dist.models.architecture import meta_replica
from lisa_dist.models.conversion import WeightSource, find_sources, join_tied
from lisa_dist.models.inspection import check_experts, check_names, check_shape, named_state
from lisa_dist.models.quantization import StagedTensors
from lisa_dist.models.weight_files import SafetensorsDirectory, weights_directory
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import fill, local_region, local_shard
from lisa_dist.runtime.seeds import keyed_seed


def load_pretrained(model: nn.Module, path: str | Path) -> list[str]:
    """Fill a sharded model from a Hugging Face directory or hub id; return the parameters left alone (adapters).

    Each rank reads its slices, in the file's dtype, and copies them into its shards of whatever dtype. Where
    transformers fuses tensors at load (the experts of a mixture), each rank fuses those of its shard. Whether a
    weight is shared is the model's to say; ``inspection.pretrained_architecture`` settles it before one is built.
    Collective: every rank (only a hub id: the first rank of a machine downloads).

    Raises:
        UserError: no safetensors, or missing, unexpected or wrongly shaped tensors.
    """
    weights = SafetensorsDirectory(weights_directory(str(path)))
    replica = meta_replica(model)
    sources, unexpected = find_sources(replica, weights.file_of)
    tensors, added = _own_tensors(model, replica)
    join_tied(replica, sources)
    filled: set[str] = set()
    for target, source in sources.items():
        filled |= _fill(target, source, weights, replica, tensors)
        tensors.settle()
    check_names(weights.directory, sorted(set(tensors) - filled), unexpected)
    return added


def initialize_random(model: nn.Module, seed: int) -> list[str]:
    """Fill a sharded model with the weights of its own initialisation; return the parameters left alone (adapters).

    The same weights at any number of ranks: each block is made in full on this rank's device, in fp32, from a generator
    keyed by ``seed`` and the block's name, and cut to the shard. A GPU has other random numbers than a CPU.

    Raises:
        UserError: a parameter has first values that the model's initialisation does not set.
    """
    device = distributed.device()
    replica = meta_replica(model)
    tensors, added = _own_tensors(model, replica)
    for name, part, recurse in _parts(replica):
        if not any(key in tensors for key in _part_state(name, part, recurse)):
            continue
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(keyed_seed(seed, name))
            _initialize(replica, name, part, recurse, device)
        for key, value in _part_state(name, part, recurse).items():
            if key in tensors:  # a tied head is not: its weight was made with the embeddings
                if value.is_floating_point() and value.flatten()[:1].isnan().any():
                    raise UserError(
                        f"model.init=random: {type(replica).__name__} sets {key} where it is built and not in its "
                        "_init_weights, so its first values are not known here; start from weights"
                    )
                fill(tensors[key], value)
        tensors.settle()
        part.to_empty(device="meta", recurse=recurse)
    return added


def restore_buffers(model: nn.Module) -> None:
    """Compute again the buffers that no checkpoint holds (rotary frequencies), which allocation left uninitialised.

    They equal those of a model that was built the usual way (tested for every family): transformers' own
    ``_init_weights`` makes them, as it does after its loading on meta. Fake tensors, of a plan, have no values to set.
    """
    with unset_fake_temporarily():
        buffers = _computed_buffers(meta_replica(model))
    for name, value in buffers.items():
        buffer = model.get_buffer(name)
        if not isinstance(buffer, FakeTensor):
            buffer.copy_(value)


def _computed_buffers(replica: nn.Module) -> dict[str, Tensor]:
    """Return the non-persistent buffers by name, on the CPU.

    Raises:
        UserError: code that comes with the model leaves what was in memory in one, as it does in transformers 5, too.
    """
    modules = dict(replica.named_modules())
    places = {
        f"{name}.{key}" if name else key: (module, key)
        for name, module in modules.items()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    }
    filling = {id(module) for module, _ in places.values()}
    found: list[dict[str, Tensor]] = []
    for before in (0, 1):
        for module, key in places.values():
            module._buffers[key] = torch.full_like(module.get_buffer(key), before, device="cpu")
        for name, module in reversed(modules.items()):  # children first
            if id(module) in filling or isinstance(module, PreTrainedModel):  # which may fill those of its blocks
                _owner(replica, name)._init_weights(module)  # parameters are on meta, where initialising does nothing
        found.append({path: module.get_buffer(key) for path, (module, key) in places.items()})
    chance = next((path for path in places if not torch.equal(found[0][path], found[1][path])), None)
    if chance is not None:
        raise UserError(
            f"model.path: {type(replica).__name__} computes {chance} where it is built and not in its _init_weights, "
            "so that transformers 5 loads it with chance numbers; let _init_weights set it"
        )
    return found[0]


def _own_tensors(model: nn.Module, replica: nn.Module) -> tuple[StagedTensors, list[str]]:
    """Return the model's parameters and persistent buffers by the architecture's names, and the names of all others.

    An adapter that wraps a layer calls it ``base_layer``.
    """
    expected = named_state(replica)
    found, added = StagedTensors(model), []
    for name, tensor in named_state(model).items():
        plain = name.replace(".base_layer.", ".")
        if plain in expected:
            found[plain] = tensor
        else:
            added.append(name)
    lost = sorted(set(expected) - set(found))
    if lost:
        raise RuntimeError(f"the sharded model lacks {', '.join(lost[:5])} of its architecture")
    return found, added


def _fill(
    target: str, source: WeightSource, weights: SafetensorsDirectory, replica: Any, tensors: dict[str, Tensor]
) -> set[str]:
    """Fill one parameter, or those that one conversion makes; return their names."""
    if source.converter is None:
        tensor = tensors[target]
        check_shape(weights.directory, target, weights.shape(source.name), tensor)
        region = local_region(tensor)
        local = local_shard(tensor.detach())
        if local.numel():
            local.copy_(weights.read(source.name, region))
        return {target}
    if not source.by_expert:
        converted = source.convert(target, replica, weights.read, slice(None))
        for name, value in converted.items():
            check_shape(weights.directory, name, tuple(value.shape), tensors[name])
            fill(tensors[name], value)
        return set(converted)
    tensor = tensors[target]
    check_experts(weights.directory, target, source, tensor)
    region = local_region(tensor)
    local = local_shard(tensor.detach())
    for place, expert in enumerate(range(*region[0].indices(tensor.shape[0]))):
        value = source.convert(target, replica, weights.read, slice(expert, expert + 1))[target]
        check_shape(weights.directory, target, (tensor.shape[0], *value.shape[1:]), tensor)
        local[place].copy_(value[0][region[1:]])
    return {target}


def _parts(replica: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the members of the module lists that lie in no other, whole; then all other modules without children."""
    members = [
        f"{name}.{child}"
        for name, module in replica.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    ]
    outermost = [name for name in members if not any(name.startswith(f"{other}.") for other in members)]
    for name, module in replica.named_modules():
        if name in outermost:
            yield name, module, True
        elif not any(name.startswith(f"{other}.") for other in outermost):
            yield name, module, False


def _part_state(name: str, part: nn.Module, recurse: bool) -> dict[str, Tensor]:
    """Return a part's tensors by their full names; without ``recurse`` only those that are directly its own."""
    prefix = f"{name}." if name else ""
    return {f"{prefix}{key}": tensor for key, tensor in named_state(part).items() if recurse or "." not in key}


def _initialize(replica: nn.Module, name: str, part: nn.Module, recurse: bool, device: torch.device) -> None:
    """Allocate a part and run the model's initialisation on it, children first, and on all that it is in."""
    part.to_empty(device=device, recurse=recurse)
    for tensor in part.state_dict().values():
        if tensor.is_floating_point():
            tensor.detach().flatten()[:1] = float("nan")  # to see what nothing sets
    inner = list(part.named_modules(prefix=name)) if recurse else [(name, part)]
    for path, module in reversed(inner):
        _owner(replica, path)._init_weights(module)
    while name:  # a head may set its layers anew, and a root its head; what else these hold is on meta
        name = name.rpartition(".")[0]
        _owner(replica, name)._init_weights(replica.get_submodule(name))


def _owner(replica: Any, name: str) -> PreTrainedModel:
    """Return the innermost transformers model that a module is, or is in: the one that knows how to initialise it."""
    while not isinstance(replica.get_submodule(name), PreTrainedModel):
        name = name.rpartition(".")[0]
    return replica.get_submodule(name)
