"""Floating-point operations of a training step, counted from the architecture, and what the GPU could do at most."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

import numpy as np
import torch

from lisa_dist.config.gpu import Gpu, read_gpu
from lisa_dist.config.loading import conf_dir
from lisa_dist.method.module import TrainModule
from lisa_dist.models.architecture import head_size
from lisa_dist.models.layer_map import EMBEDDINGS, block_of
from lisa_dist.models.quantization import count_weights

logger = logging.getLogger(__name__)

KINDS_OF_LAYERS = ("layer_types", "layers_block_type")  # where architectures name them, one for each layer
EXPERTS = (  # how architectures name the experts of a layer, and those that a token visits
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk"),
)


def parameter_flops_per_token(train_module: TrainModule) -> float:
    """Return the matrix operations that a token costs in the parameters that train now and in the frozen ones.

    A parameter costs 2 in the forward pass, 2 for the gradient of its input and, where it trains, 2 for its own
    gradient. Where the embeddings are frozen the backward pass ends at the lowest active block, so a block below
    costs its forward pass only. Embedding tables are looked up, not multiplied, but for the one that the head is tied
    to; of a mixture's experts those are counted that a token visits.
    """
    store, trained = train_module.store, train_module.optimizer.parameters
    layers = store.layers
    lowest = store.lowest_reached()
    architecture = store.module.config
    experts, per_token = _experts(architecture)
    head = getattr(layers.head, "weight", None)
    tables = zip([*layers.embedding_names, layers.head_name], [*layers.embeddings, layers.head])
    multiplied = {f"{name}.weight" for name, module in tables if getattr(module, "weight", None) is head}
    total = 0.0
    for name in store.names:
        part = layers.group_of(name)
        if part == EMBEDDINGS and name not in multiplied:
            continue
        block = block_of(part)
        below = block is not None and block < lowest
        shape = store.parameter(name).shape
        visited = per_token / experts if ".experts." in name or (len(shape) == 3 and shape[0] == experts) else 1.0
        total += (2 if below else 6 if name in trained else 4) * visited * count_weights(name, store.parameter(name))
    return total


def step_flops(train_module: TrainModule, lengths: np.ndarray) -> float:
    """Return the operations of a step over samples of ``lengths`` tokens; what is spent on padding does not count."""
    return parameter_flops_per_token(train_module) * float(lengths.sum()) + attention_flops(train_module, lengths)


def attention_flops(train_module: TrainModule, lengths: np.ndarray) -> float:
    """Return the operations of attention over samples of ``lengths`` tokens, forward and backward.

    12 x layers x heads x head size x tokens for each token (arXiv 2204.02311, appendix B): every query with every
    key, as is the custom, though causal attention needs but half. 4 of the 12 are of the forward pass, all that a layer
    costs below the lowest one that gradients reach. Layers of a hybrid that scan or convolve have none.
    """
    architecture: Any = train_module.store.module.config
    squares = float(np.square(lengths, dtype=np.float64).sum())
    blocks, lowest = len(train_module.store.layers.blocks), train_module.store.lowest_reached()
    widths = _attention_widths(architecture, blocks)
    kinds: list[str] = next((found for name in KINDS_OF_LAYERS if (found := getattr(architecture, name, None))), [])
    if len(kinds) == blocks:
        widths = [width if _attends(kind) else 0 for kind, width in zip(kinds, widths)]
    return (12.0 * sum(widths[lowest:]) + 4.0 * sum(widths[:lowest])) * squares


def peak_rate(device: torch.device) -> float | None:
    """Return the FLOP/s of one device by its preset in conf/gpu; None on a CPU and for a GPU that has no preset."""
    gpu = preset_of(device)
    return None if gpu is None else gpu.matrix_flops


def preset_of(device: torch.device) -> Gpu | None:
    """Return the preset of a device in conf/gpu; None on a CPU and for a GPU that has none."""
    return None if device.type != "cuda" else preset_named(torch.cuda.get_device_name(device))


@functools.cache
def preset_named(device_name: str) -> Gpu | None:
    """Return the preset whose name stands in the device's, however that is spaced: best one of its memory size."""
    found = {}
    for preset in sorted(file.stem for file in (conf_dir() / "gpu").glob("*.yaml")):
        name, _, size = re.fullmatch(r"(.*?)(_(\d+gb))?", preset).groups()  # type: ignore[union-attr]
        if re.search(rf"\b{' ?'.join(name.replace('_', ''))}\b", device_name, re.IGNORECASE):
            found[size is not None and size in device_name.lower()] = preset
    if found:
        return read_gpu(found[max(found)])
    logger.warning("conf/gpu has no preset for %s: how far it is used is not known", device_name)
    return None


def _attention_widths(architecture: Any, blocks: int) -> list[int]:
    """Return heads x head size of each layer; zeros of an architecture without attention."""
    try:
        width = (getattr(architecture, "num_attention_heads", None) or 0) * (head_size(architecture) or 0)
    except RuntimeError:  # as above
        return [layer.num_attention_heads * (head_size(layer) or 0) for layer in architecture.per_layer_config]
    return [width] * blocks


def _attends(kind: str) -> bool:
    """Whether a layer of this kind, as architectures name them, has softmax attention."""
    return kind.startswith("hybrid") or ("attention" in kind and not kind.startswith("linear"))


def _experts(architecture: Any) -> tuple[int, int]:
    """Return the experts of a mixture's layer, and how many of them a token visits; 1 and 1 of other models."""
    part = getattr(architecture, "ffn_config", architecture)  # DBRX's
    found = (next((count for name in names if (count := getattr(part, name, None))), 1) for names in EXPERTS)
    return tuple(found)  # type: ignore[return-value]
