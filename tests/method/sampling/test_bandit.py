import math
from itertools import pairwise

import pytest

from lisa_dist.config.sampling import BanditSamplerConfig
from lisa_dist.method.sampling import build_sampler

DEPTHS = [22, 32, 48, 80]


def run(num_blocks, squares, periods, **settings):
    """Draw and observe one step a period; the draws."""
    sampler = build_sampler(BanditSamplerConfig(**settings), num_blocks)
    draws = []
    for period in range(periods):
        draws.append(sampler.draw(period))
        sampler.observe_step({block: squares[block] for block in draws[-1]})
    return draws


def longest_wait(draws, num_blocks):
    """The most periods in a row without a block, of the block for which it is longest."""
    waits = []
    for block in range(num_blocks):
        trained = [-1, *(period for period, draw in enumerate(draws) if block in draw), len(draws)]
        waits.append(max(later - earlier - 1 for earlier, later in pairwise(trained)))
    return max(waits)


@pytest.mark.parametrize("num_blocks", DEPTHS)
@pytest.mark.parametrize("active", [1, 2, 3, 8])
@pytest.mark.parametrize("squares", ["equal", "one far above"])
def test_every_block_trains_once_first_and_never_waits_for_long(num_blocks, active, squares):
    levels = [1.0] * num_blocks
    if squares == "one far above":
        levels[3] = 1e6
    draws = run(num_blocks, levels, 6 * num_blocks, active_layers=active, seed=5)
    first_round = math.ceil(num_blocks / active)
    assert {block for draw in draws[:first_round] for block in draw} == set(range(num_blocks))
    forced = {1: 0.5, 2: 1, 3: 1, 8: 2}[active]  # a period
    assert longest_wait(draws, num_blocks) <= num_blocks / forced
    assert all(len(draw) == active == len(set(draw)) for draw in draws)


@pytest.mark.parametrize("num_blocks", DEPTHS)
@pytest.mark.parametrize("active", [1, 2, 4])
def test_blocks_with_large_gradients_train_more_often(num_blocks, active):
    levels = [16.0 if block < 4 else 1.0 for block in range(num_blocks)]
    draws = run(num_blocks, levels, 20 * num_blocks, active_layers=active, eta=1.0)
    counts = [sum(block in draw for draw in draws) for block in range(num_blocks)]
    assert min(counts[:4]) > 2 * max(counts[4:])
    equal = run(num_blocks, [1.0] * num_blocks, 20 * num_blocks, active_layers=active)
    counts = [sum(block in draw for draw in equal) for block in range(num_blocks)]
    assert max(counts) < 2 * min(counts)


@pytest.mark.parametrize("active", [2, 3, 4, 9])
def test_the_longest_waiting_is_in_every_draw(active):
    num_blocks = 22
    draws = run(num_blocks, [1.0 + block for block in range(num_blocks)], 100, active_layers=active)
    last = [-1] * num_blocks
    for period, draw in enumerate(draws):
        oldest = min(last)
        assert any(last[block] == oldest for block in draw)
        for block in draw:
            last[block] = period


def test_weights_follow_the_corrected_moving_average_up_to_the_largest_exponent():
    sampler = build_sampler(BanditSamplerConfig(active_layers=1, eta=2.0, smoothing=0.2), num_blocks=4)
    assert sampler.probe is None and sampler.observes_steps
    assert sampler.weights() == [1.0] * 4
    sampler.observe_step({0: 3.0, 1: 0.5})
    sampler.observe_step({0: 5.0})
    average = 0.8 * 0.2 * 3.0 + 0.2 * 5.0
    estimates = [average / (1 - 0.8**2), 0.5, 0.0, 0.0]
    assert sampler.scores() == pytest.approx(estimates)
    mean = sum(estimates) / 4
    assert 2.0 * estimates[0] / mean > 5
    expected = [math.exp(min(5.0, 2.0 * estimate / mean)) for estimate in estimates]
    assert sampler.weights() == pytest.approx(expected) and expected[0] == math.exp(5)


def test_gradients_of_zero_are_drawn_uniformly():
    draws = run(4, [0.0] * 4, 400, active_layers=1)
    assert min(sum(block in draw for draw in draws) for block in range(4)) > 50
