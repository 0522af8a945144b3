"""A tiny copy of a model's architecture: every kind of its blocks, narrow, with random weights, on the CPU.

Sizes of an architecture depend on each other (heads x head size = width, and the like), so they are not set one by
one: every count of heads is divided by one number, every size of a head by another, and every other width by the
product of both, which keeps all such products true.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lisa_dist.config.errors import in_one_line
from lisa_dist.models.architecture import original_class

VOCABULARY = 128
FIRST_PLAIN_TOKEN = 16  # below it lie the special tokens
POSITIONS = 64  # at least
WINDOW = 8  # tokens that windows, chunks and other reaches over the sequence are cut to
EXPERTS = 16  # enough for groups of experts with several in each
HEADS = 4  # at least
HEAD_SIZE = 16  # at least, and half of it may be rotary
MULTIPLE = 8  # of widths and sizes of heads that are multiples of it, for kernels
NARROW = 32  # widths up to this stay: ranks, kernels, states
MAX_PARAMETERS = 50_000_000
WEIGHT_GAIN = 1.5  # attention must not be uniform, and every block must change the result much

_POSITIONS = re.compile(r"^max_(position|seq)|^n_(positions|ctx)$|^context_length$|^model_max_length$")
_SAME = re.compile(r"position|type|kernel|conv|pattern|state|batch|ngram_size|groups?_size|patch")
_HEAD_SIZE = re.compile(r"head_?dim|dim_head|d_head|head_size|kv_channels|rotary_dim")
_HEAD_COUNT = re.compile(r"(^|_)n?_?heads?(_per_layer)?$|num_query_groups$|multi_query_group_num$")
_LAYER_COUNT = re.compile(r"layers?$|^num_blocks$")
_REACH = re.compile(r"window(_size|_len)?$|chunk_?(size|length)|^local_attention$|block_size$|topk(_blocks)?$|compress")
_CHOSEN_EXPERTS = re.compile(r"experts_per_tok|^moe_(top)?_?k$|num_selected_experts|top_k_experts")
_EXPERT_COUNT = re.compile(r"experts$|expert_num$")
_TOKEN = re.compile(r"_token_id$|_index$|_idx$")
_WIDTH = re.compile(r"size|dim|width|d_model|d_inner|d_ssm|d_ff|dff|ffn|n_embd|n_inner|intermediate|^d_rel$|channels")


class NoTinyCopyError(Exception):
    """A tiny copy can't be made; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How an architecture is made smaller."""

    heads: int  # what counts of heads are divided by
    head_size: int  # what sizes of heads are divided by
    old_depth: int
    depth: int

    @property
    def width(self) -> int:
        """What all other widths are divided by."""
        return self.heads * self.head_size


def tiny_copy(model: Any, blocks_path: str) -> PreTrainedModel:
    """Return a tiny copy of ``model``'s architecture in float32 on the CPU, in eval mode, with random weights.

    It has as many blocks as are needed for every kind that ``model`` has, a causal language model as transformers
    builds it, on any device. Random states stay as they were.

    Raises:
        NoTinyCopyError: no smaller model with all kinds of blocks can be built.
    """
    kinds = _kinds_of_blocks(model, blocks_path)
    old_depth = sum(kinds.values())
    depths = [2**n for n in range(1, old_depth.bit_length()) if 2**n < old_depth]
    depths.append(old_depth)  # consistent with whatever is derived from the depth
    reason = ""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # small sizes and odd token ids are meant
    try:
        for depth in depths:
            try:
                config = shrink(model.config, old_depth, depth)
                with torch.device("meta"):
                    small = _build(model, config)
                if set(_kinds_of_blocks(small, blocks_path)) != set(kinds):
                    reason = f"{depth} narrow blocks are not of the kinds that the {old_depth} are"
                    continue
                parameters = sum(parameter.numel() for parameter in small.parameters())
                if parameters > MAX_PARAMETERS:
                    reason = f"it would have {parameters:,} parameters"
                    continue
                return _with_random_weights(model, config)
            except Exception as error:  # whatever a foreign configuration or model raises on unusual sizes
                reason = in_one_line(error) or type(error).__name__
    finally:
        transformers.logging.set_verbosity(verbosity)
    raise NoTinyCopyError(reason)


def shrink(config: PretrainedConfig, old_depth: int, depth: int) -> PretrainedConfig:
    """Return a copy of ``config`` that is narrow, with ``depth`` blocks in place of ``old_depth``."""
    fields = config.to_dict()
    scale = Scale(*_divisors(config, fields), old_depth, depth)
    small = {name: _shrunk(name, value, scale) for name, value in fields.items()}
    for name in ("transformers_version", "model_type", "_name_or_path", "dtype", "auto_map", "architectures"):
        small.pop(name, None)
    return type(config)(**small)


def _divisors(config: PretrainedConfig, fields: dict[str, Any]) -> tuple[int, int]:
    """Return what counts of heads and sizes of heads are divided by, without a remainder."""

    def number(name: str) -> int | None:
        value = fields.get(config.attribute_map.get(name, name))
        return value if isinstance(value, int) else None

    numbers = list(_numbers(fields))
    heads = number("num_attention_heads") or next((value for name, value in numbers if _HEAD_COUNT.search(name)), 1)
    shared = (value for name, value in numbers if _HEAD_COUNT.search(name) or name.endswith("n_groups"))
    common = math.gcd(heads, *(value for value in shared if 1 < value < heads))
    by_heads = max(by for by in range(1, common + 1) if common % by == 0 and (by == 1 or heads // by >= HEADS))
    sizes = [value for name, value in numbers if _HEAD_SIZE.search(name) and value > 1]
    width = number("hidden_size")
    if width is not None and number("head_dim") is None and width % heads == 0:
        sizes.append(width // heads)
    rotary_share = fields.get("partial_rotary_factor") or (fields.get("rope_parameters") or {}).get(
        "partial_rotary_factor", 1
    )

    def divides(by: int) -> bool:
        small = [size // by for size in sizes]
        return (
            all(size % by == 0 and size // by >= min(size, HEAD_SIZE // 2) for size in sizes)
            and all(size // by % MULTIPLE == 0 for size in sizes if size % MULTIPLE == 0)
            and max(small) >= HEAD_SIZE
            and int(small[-1] * rotary_share) % 2 == 0
            and (width is None or width % (by_heads * by * MULTIPLE) == 0)
        )

    return by_heads, max((by for by in (2, 4, 8, 16, 32) if sizes and divides(by)), default=1)


def _numbers(fields: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers({key: inner for key, inner in value.items() if isinstance(key, str)})
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool):
                yield name, number


def _shrunk(name: str, value: Any, scale: Scale) -> Any:
    """Return the value of a field of the tiny configuration."""
    if name in ("id2label", "label2id"):
        return value
    if name.startswith("rope") and isinstance(value, dict):
        return {key: _shrunk_rotary(inner, scale) for key, inner in value.items()}
    if name == "per_layer_config":  # by the block's number
        value = {key: inner for key, inner in value.items() if int(key) < scale.depth}
    if isinstance(value, dict):
        return {key: _shrunk(str(key), inner, scale) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        kept = value[: scale.depth] if len(value) == scale.old_depth else value
        return type(value)(_shrunk(name, item, scale) for item in kept)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value
    return _shrunk_number(name, value, scale)


def _shrunk_number(name: str, value: int, scale: Scale) -> int:
    if _LAYER_COUNT.search(name):
        return scale.depth if value == scale.old_depth else value
    if _TOKEN.search(name):
        return value if value < FIRST_PLAIN_TOKEN else 1
    if "vocab" in name and "type" not in name:
        return VOCABULARY
    if _POSITIONS.search(name):
        return max(value, POSITIONS)
    if _REACH.search(name):
        return min(value, WINDOW)
    if _SAME.search(name):
        return value
    if _HEAD_SIZE.search(name):
        return value // scale.head_size if value % scale.head_size == 0 else value
    if _HEAD_COUNT.search(name) or name.endswith("n_groups"):
        return value // scale.heads if value % scale.heads == 0 else value
    if _CHOSEN_EXPERTS.search(name):
        return min(value, 2)
    if _EXPERT_COUNT.search(name):
        return min(value, EXPERTS)
    if name.endswith("rank"):
        return min(value, HEAD_SIZE)
    if _WIDTH.search(name) and value > NARROW:
        return max(1, round(value / scale.width / MULTIPLE)) * MULTIPLE
    return value


def _shrunk_rotary(value: Any, scale: Scale) -> Any:
    """Return a part of the rotary embedding's settings: what is given a frequency is cut, or split anew."""
    if isinstance(value, dict):
        return {key: _shrunk_rotary(inner, scale) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    if all(isinstance(item, int) for item in value):
        return [item // scale.head_size for item in value]
    return value[: len(value) // scale.head_size]


def _build(model: Any, config: PretrainedConfig) -> Any:
    config._attn_implementation = model.config._attn_implementation
    config.use_cache = False
    return original_class(model)._from_config(config, dtype=torch.float32)


def _with_random_weights(model: Any, config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.manual_seed(0)
        small = _build(model, config)
        for name, parameter in small.named_parameters():
            if "embed" in name and parameter.dim() == 2:
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_GAIN / math.sqrt(parameter.shape[-1]))
            else:  # scales and biases: gates that begin at zero are opened
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return small.eval()


def _kinds_of_blocks(model: nn.Module, blocks_path: str) -> Counter[frozenset[tuple[str, ...]]]:
    """Return how many blocks there are of each kind: its modules, and their settings that are no numbers."""
    return Counter(
        frozenset(
            (re.sub(r"\d+", "*", name), type(module).__name__, *_settings(module))
            for name, module in block.named_modules()
        )
        for block in model.get_submodule(blocks_path).children()
    )


def _settings(module: nn.Module) -> list[str]:
    return sorted(
        f"{name}={value}"
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and (value is None or isinstance(value, bool | str))
    )
