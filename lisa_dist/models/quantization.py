"""Frozen linear layers in 8 or 4 bits, under adapters: integers that FSDP2 shards and gathers as they are.

No kernel of another package is used, so it runs wherever torch does: a layer is turned into floating-point numbers
one at a time, right before it is used, in the forward and again in the backward pass.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_dist.models.layer_map import weights_read
from lisa_dist.runtime.distributed import as_sharded, computed_on, local_shard

BLOCK = 64  # inputs of a row that share one scale in nf4, or the largest power of two below that divides them
INT8_LARGEST = 127


@functools.cache
def nf4_levels() -> tuple[float, ...]:
    """Return the 16 levels of the 4-bit NormalFloat type, ascending from -1 to 1 (arXiv 2305.14314, section 3).

    They are quantiles of the normal distribution: eight of its positive half, seven of its negative, and zero.
    """
    quantile = statistics.NormalDist().inv_cdf
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # so that both ends lie half a step inside (0, 1)

    def half(count: int) -> list[float]:
        return [quantile(outermost - index * (outermost - 0.5) / count) for index in range(count)]

    levels = [-value for value in half(7)] + [0.0] + half(8)[::-1]
    top = max(levels)
    return tuple(sorted(level / top for level in levels))


def block_size(inputs: int) -> int:
    """Return how many inputs of a row share a scale in nf4: a power of two of at most 64 that divides them."""
    size = BLOCK
    while inputs % size:
        size //= 2
    return size


def quantize(rows: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of some rows of a weight, [rows, inputs].

    Scales are numbers that bf16 has, so that they may be stored and gathered in it. ``int8``: codes int8, the largest
    of a row 127; one scale a row, [rows, 1]. ``nf4``: two codes a byte, uint8 [rows, inputs / 2]; one scale a block,
    [rows, inputs / block].
    """
    rows = rows.float()
    if kind == "int8":
        scale = (rows.abs().amax(1, keepdim=True) / INT8_LARGEST).bfloat16().float()
        codes = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
        return codes.clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale
    blocks = rows.unflatten(1, (-1, block_size(rows.shape[1])))
    scale = blocks.abs().amax(2).bfloat16().float()
    levels = torch.tensor(nf4_levels(), device=rows.device)
    borders = (levels[1:] + levels[:-1]) / 2
    relative = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).flatten(1)
    codes = torch.bucketize(relative, borders).to(torch.uint8)
    return codes[:, ::2] * 16 + codes[:, 1::2], scale


def dequantize(codes: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Return the weight, [rows, inputs], that :func:`quantize` made codes and scales of."""
    if kind == "int8":
        return codes.to(dtype) * scale.to(dtype)
    both = torch.stack([codes // 16, codes % 16], dim=2).flatten(1)
    values = torch.tensor(nf4_levels(), dtype=dtype, device=codes.device)[both.int()]
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.to(dtype)[..., None]).flatten(1)


def count_weights(name: str, parameter: Tensor) -> int:
    """Return how many of the model's weights a parameter holds: two a byte as codes of nf4, none as scales."""
    if name.endswith(".weight_scale"):
        return 0
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


class QuantizedProduct(torch.autograd.Function):
    """``F.linear`` with a quantised weight; the backward pass dequantises again instead of keeping a copy."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        """Shapes: inputs [..., inputs]; returns [..., outputs]."""
        ctx.save_for_backward(codes, scale)
        ctx.kind = kind
        return F.linear(inputs, dequantize(codes, scale, kind, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        codes, scale = ctx.saved_tensors
        return incoming[0] @ dequantize(codes, scale, ctx.kind, incoming[0].dtype), None, None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose ``weight`` are codes, with their scales in ``weight_scale``."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        """Take the place of ``layer``, on ``meta``; values come later (:func:`fill_quantized`)."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        codes, scale = quantize(layer.weight.to("meta"), kind)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        return QuantizedProduct.apply(input, self.weight, self.weight_scale, self.bias, self.kind)


def quantize_linears(blocks: list[nn.Module], kind: str) -> int:
    """Put :class:`QuantizedLinear` in the place of the blocks' linear layers, on ``meta``; return how many.

    Adapters stay as they are, and so do fused experts, GPT-2's transposed layers, and layers whose weights the model
    reads itself, as Mamba's, or whose dtype, which would be those of codes.
    """
    count = 0
    for block in blocks:
        for name, layer in list(block.named_modules()):
            halves = kind == "nf4" and isinstance(layer, nn.Linear) and layer.in_features % 2
            parent, _, attribute = name.rpartition(".")
            reader, _, read = name.removesuffix(".base_layer").rpartition(".")
            kind_of_reader: Any = type(block.get_submodule(reader))  # it has a hash
            if read in weights_read(kind_of_reader, dtype_too=True):
                continue
            if type(layer) is nn.Linear and ".lora_" not in f".{name}" and not halves:
                setattr(block.get_submodule(parent), attribute, QuantizedLinear(layer, kind))
                count += 1
    return count


class StagedTensors(dict[str, Tensor]):
    """Parameters by the architecture's names, to be filled from a checkpoint.

    A quantised weight is replaced by its shard in bf16, which is made when it is asked for and quantised
    and freed by :meth:`settle`: so one weight at a time is held unquantised.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layers = {
            f"{name.replace('.base_layer', '')}.weight": module
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
        }
        self._staged: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            return super().__getitem__(name)
        if name not in self._staged:
            layer = self._layers[name]
            local = local_shard(layer.weight.detach())
            device = computed_on(layer.weight)  # where it is quantised sooner than in host memory
            rows = local.new_empty(local.shape[0], layer.in_features, dtype=torch.bfloat16, device=device)
            self._staged[name] = as_sharded(rows, layer.weight, (layer.out_features, layer.in_features))
        return self._staged[name]

    def settle(self) -> None:
        """Quantise what was asked for since the last call, and by now is filled."""
        for name, staged in self._staged.items():
            layer = self._layers[name]
            codes, scale = quantize(local_shard(staged), layer.kind)
            local_shard(layer.weight.detach()).copy_(codes)
            local_shard(layer.weight_scale.detach()).copy_(scale)
        self._staged = {}
