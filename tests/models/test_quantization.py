"""Codes and scales of quantised weights, and the product with them."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from lisa_dist.models.layer_map import weights_read
from lisa_dist.models.quantization import (
    QuantizedLinear,
    block_size,
    dequantize,
    nf4_levels,
    quantize,
    quantize_linears,
)


def make_rows(inputs: int = 192) -> torch.Tensor:
    return torch.randn(5, inputs, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 5)[:, None]


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    levels = nf4_levels()
    assert len(levels) == 16 and list(levels) == sorted(levels)
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1)
    normal = statistics.NormalDist()
    outermost = normal.inv_cdf(0.5 * ((1 - 1 / 32) + (1 - 1 / 30)))
    shares = [normal.cdf(level * outermost) for level in levels]
    assert torch.tensor(shares[7:]).diff() == pytest.approx((shares[15] - 0.5) / 8)
    assert torch.tensor(shares[:8]).diff() == pytest.approx((0.5 - shares[0]) / 7)


def test_int8_is_off_by_half_a_step_of_its_row_at_most() -> None:
    rows = make_rows()
    codes, scale = quantize(rows, "int8")
    assert codes.dtype == torch.int8 and codes.shape == rows.shape and scale.shape == (5, 1)
    assert torch.equal(scale, scale.bfloat16().float())
    error = (dequantize(codes, scale, "int8", torch.float32) - rows).abs()
    # Only the largest of a row can be further off, by what bf16 cuts off its scale.
    assert (error <= scale * (0.5 + 127 * 2**-8)).all() and (error <= 0.5001 * scale).float().mean() > 0.98


def test_nf4_takes_the_nearest_level_of_its_block() -> None:
    rows = make_rows()
    codes, scale = quantize(rows, "nf4")
    assert codes.dtype == torch.uint8 and codes.shape == (5, 96) and scale.shape == (5, 3)
    found = dequantize(codes, scale, "nf4", torch.float32)
    levels = torch.tensor(nf4_levels())
    for row in range(5):
        for column in range(0, 192, 7):
            choices = levels * scale[row, column // 64]
            nearest = choices[(choices - rows[row, column]).abs().argmin()]
            assert found[row, column] == nearest


@pytest.mark.parametrize(("inputs", "size"), [(256, 64), (96, 32), (54, 2)])
def test_blocks_divide_any_even_number_of_inputs(inputs: int, size: int) -> None:
    assert block_size(inputs) == size
    codes, scale = quantize(make_rows(inputs), "nf4")
    assert dequantize(codes, scale, "nf4", torch.float32).shape == (5, inputs)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_zero_rows_stay_zero(kind: str) -> None:
    codes, scale = quantize(torch.zeros(2, 64), kind)
    assert not dequantize(codes, scale, kind, torch.float32).any()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_product_and_gradient_are_those_of_the_dequantised_weight(kind: str) -> None:
    block = nn.ModuleDict({"linear": nn.Linear(64, 5, device="meta"), "norm": nn.LayerNorm(5)})
    quantize_linears([block], kind)
    layer = block["linear"]
    assert isinstance(layer, QuantizedLinear) and isinstance(block["norm"], nn.LayerNorm)
    codes, scale = quantize(make_rows(64), kind)
    layer.weight, layer.weight_scale = (nn.Parameter(part, requires_grad=False) for part in (codes, scale))
    layer.bias = nn.Parameter(torch.arange(5.0))
    inputs = torch.randn(2, 3, 64, requires_grad=True)
    plain = inputs.detach().clone().requires_grad_()
    output = layer(inputs)
    expected = nn.functional.linear(plain, dequantize(codes, scale, kind, torch.float32), layer.bias)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(inputs.grad, plain.grad)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(4, 4, device="meta") for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden @ self.gate.weight.type(torch.float32)  # as LongCat Flash's router
        return self.down(self.up(hidden.to(self.up.weight.dtype)))  # as DeepSeek V3.2's indexer


def test_layers_whose_weights_the_model_reads_itself_are_left_as_they_are() -> None:
    block = Reader()
    assert weights_read(Reader) == {"gate"}  # what adapters leave out
    assert quantize_linears([block], "nf4") == 1 and isinstance(block.down, QuantizedLinear)
