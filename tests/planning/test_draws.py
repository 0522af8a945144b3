"""Where a backward pass ends at the lowest active block: a plan is the mean over draws, with its range."""

from __future__ import annotations

import statistics

import pytest

from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.config.sampling import FixedSamplerConfig
from lisa_dist.planning.draws import coming_draws, mean_lowest, typical_draws
from lisa_dist.planning.prediction import predict, predict_over_draws
from lisa_dist.planning.simulation import simulate

BLOCKS = 3
SMALL = [
    "model=custom",
    f"model.architecture={{model_type:llama,vocab_size:301,hidden_size:54,intermediate_size:101,"
    f"num_hidden_layers:{BLOCKS},num_attention_heads:3,num_key_value_heads:1}}",
    "data=custom",
    "data.sequence_length=40",
    "train.global_batch_size=2",
    "train.micro_batch_size=2",
]


def simulated(config: Config, blocks: list[int]) -> int:
    """The operations of a step over exactly these blocks."""
    config.sampler = FixedSamplerConfig(blocks=blocks)
    return simulate(config).work.flops


@pytest.mark.parametrize("blocks", [BLOCKS, pytest.param(8, marks=pytest.mark.soak)])  # of 8 two depths are simulated
def test_the_planned_work_is_the_mean_over_draws_and_its_range_that_of_the_first_and_the_last_block(
    blocks: int,
) -> None:
    overrides = [*SMALL, "method=badam", f"model.architecture.num_hidden_layers={blocks}"]
    each = [simulated(load(overrides), [block]) for block in range(blocks)]
    trace, bounds = predict_over_draws(load(overrides))
    assert bounds is not None
    assert (bounds[0].work.flops, bounds[1].work.flops) == (min(each), max(each)) == (each[-1], each[0])
    assert trace.work.flops == pytest.approx(statistics.mean(each), rel=1e-6)
    assert trace.peaks == predict(load(overrides)).peaks, "memory is planned for any draw"


def test_nothing_is_averaged_where_the_backward_pass_reaches_every_block() -> None:
    for overrides in (
        [],
        ["method=full"],
        ["method=lora"],
        ["method=lisa_lean"],
        ["always_active.embeddings=false", "sampler=all"],
    ):
        config = load([*SMALL, *overrides])
        assert coming_draws(config, BLOCKS) == [] and typical_draws(config, BLOCKS) == {}
    assert predict_over_draws(config)[1] is None


@pytest.mark.parametrize("sampler", ["uniform", "sweep", "gradient"])
def test_three_typical_draws_have_the_mean_of_all(sampler: str) -> None:
    config = load([*SMALL, "always_active.embeddings=false", f"sampler={sampler}", "sampler.active_layers=2"])
    draws = coming_draws(config, 32)
    assert all(len(set(draw)) == 2 for draw in draws)
    if sampler != "sweep":  # the smaller of two of 32 that differ
        assert mean_lowest(draws) == pytest.approx(10, abs=1)
    typical = typical_draws(config, 32)
    assert list(typical) == ["low", "middle", "high"]
    assert mean_lowest(list(typical.values())) == pytest.approx(mean_lowest(draws), abs=1.5)
