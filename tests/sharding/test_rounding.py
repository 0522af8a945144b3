"""Stochastic rounding, on plain tensors."""

from __future__ import annotations

import torch

from lisa_dist.sharding.rounding import ROUNDING_CHUNK, convert, round_stochastically, rounding_seed


def test_rounding_goes_to_a_neighbour_and_is_unbiased() -> None:
    value = torch.tensor(1.0 + 0.3 / 128)  # bf16 has 1 and 1 + 1/128 here: 30% of the way up
    rounded = round_stochastically(value.expand(200_000), seed=3).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    share_up = (rounded > 1).float().mean().item()
    assert abs(share_up - 0.3) < 5 * (0.3 * 0.7 / 200_000) ** 0.5


def test_mean_error_over_many_values_and_signs_vanishes() -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    error = (round_stochastically(values, seed=1).double() - values.double()) / values.abs().double()
    assert abs(error.mean().item()) < 5 * error.std().item() / len(values) ** 0.5
    assert error.abs().max().item() <= 2**-7


def test_values_that_bf16_holds_stay() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 3.0e38], dtype=torch.bfloat16).float()
    assert torch.equal(round_stochastically(values, seed=5).float(), values)
    assert round_stochastically(torch.tensor([float("nan")]), seed=5).isnan().all()


def test_noise_depends_on_every_part_of_its_key() -> None:
    keys = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    assert len({rounding_seed(*key) for key in keys}) == len(keys)
    values = torch.full((1000,), 1.003)
    first = round_stochastically(values, rounding_seed(*keys[0]))
    assert torch.equal(first, round_stochastically(values, rounding_seed(*keys[0])))
    assert not torch.equal(first, round_stochastically(values, rounding_seed(*keys[1])))


def test_long_tensors_are_rounded_in_chunks_of_different_noise() -> None:
    rounded = round_stochastically(torch.full((ROUNDING_CHUNK + 10,), 1.003), seed=2)
    assert len(rounded) == ROUNDING_CHUNK + 10
    assert 0 < (rounded[ROUNDING_CHUNK:] > 1).float().mean() < 1
    assert not torch.equal(rounded[: ROUNDING_CHUNK // 2], rounded[ROUNDING_CHUNK // 2 : ROUNDING_CHUNK])


def test_convert_rounds_to_nearest_without_a_seed() -> None:
    values = torch.full((1000,), 1.0 + 0.3 / 128)
    assert torch.equal(convert(values, torch.bfloat16, None).float(), torch.ones(1000))
    assert convert(values, torch.float32, 7).dtype == torch.float32
