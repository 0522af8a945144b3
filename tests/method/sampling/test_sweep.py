import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import SweepSamplerConfig
from lisa_dist.method.sampling import build_sampler


def draws(config, num_blocks, periods):
    sampler = build_sampler(config, num_blocks)
    return [sampler.draw(period) for period in range(periods)]


def test_the_orders_of_badam():
    one = {"active_layers": 1}
    assert draws(SweepSamplerConfig(**one, order="ascending"), 3, 4) == [[0], [1], [2], [0]]
    assert draws(SweepSamplerConfig(**one), 3, 4) == [[2], [1], [0], [2]]
    assert draws(SweepSamplerConfig(**one, order="given", sequence=[1, 2, 0]), 3, 4) == [[1], [2], [0], [1]]


def test_a_random_sweep_trains_each_block_once_in_a_new_order():
    drawn = draws(SweepSamplerConfig(active_layers=2, order="random", seed=5), 6, 30)
    sweeps = [drawn[first : first + 3] for first in range(0, 30, 3)]
    for sweep in sweeps:
        assert sorted(block for draw in sweep for block in draw) == [0, 1, 2, 3, 4, 5]
    assert len({tuple(map(tuple, sweep)) for sweep in sweeps}) > 5


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_no_block_gets_ahead_where_the_sweep_does_not_divide(order):
    counts = [0] * 7
    for draw in draws(SweepSamplerConfig(active_layers=3, order=order), 7, 50):
        assert len(set(draw)) == 3
        for block in draw:
            counts[block] += 1
        assert max(counts) - min(counts) <= 1


def test_a_period_ends_one_sweep_and_begins_the_next():
    assert draws(SweepSamplerConfig(active_layers=2, order="ascending"), 3, 3) == [[0, 1], [0, 2], [1, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "up"}, "sampler.order=up: must be one of"),
        ({"order": "given"}, r"sampler.sequence=\[\]: sampler.order=given needs every block's index once"),
        ({"sequence": [0, 1, 2]}, "sampler.order=descending reads no sequence"),
        ({"order": "given", "sequence": [0, 0, 2]}, "must name each of the 3 blocks of this model once, 0 to 2"),
        ({"active_layers": 4}, "sampler.active_layers=4: must be at most 3"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        build_sampler(SweepSamplerConfig(**settings), num_blocks=3)
