from itertools import pairwise

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import CoverageSamplerConfig
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import chi_square, chi_square_limit


@pytest.mark.parametrize(
    ("num_blocks", "active", "window"), [(8, 2, 4), (8, 2, 5), (7, 3, 3), (7, 3, 4), (5, 5, 1), (9, 1, 9), (10, 3, 20)]
)
def test_every_window_trains_every_block(num_blocks, active, window):
    sampler = build_sampler(CoverageSamplerConfig(active_layers=active, window=window), num_blocks)
    drawn = [sampler.draw(period) for period in range(30 * window)]
    assert all(len(set(draw)) == active for draw in drawn)
    for first in range(len(drawn) - window + 1):
        seen = {block for draw in drawn[first : first + window] for block in draw}
        assert seen == set(range(num_blocks)), f"periods {first} to {first + window - 1}"


def test_no_block_is_favoured_and_draws_repeat_only_by_chance():
    sampler = build_sampler(CoverageSamplerConfig(active_layers=2, seed=2), num_blocks=8)
    assert sampler.window == 8  # twice the fewest, 8 / 2
    drawn = [sampler.draw(period) for period in range(4000)]
    counts = [sum(block in draw for draw in drawn) for block in range(8)]
    assert chi_square(counts, [1000.0] * 8) < chi_square_limit(degrees=7)
    repeated = sum(bool(set(one) & set(two)) for one, two in pairwise(drawn))
    assert 0.2 < repeated / 4000 < 0.6  # a plain uniform draw repeats a block with probability 1 - 15/28 = 0.46


def test_a_window_that_is_too_short_is_an_error_that_says_so():
    with pytest.raises(UserError, match=r"sampler.window=3: must be at least 4, for 2 of 8 blocks"):
        build_sampler(CoverageSamplerConfig(active_layers=2, window=3), num_blocks=8)
    with pytest.raises(UserError, match=r"sampler.active_layers=9: must be at most 8"):
        build_sampler(CoverageSamplerConfig(active_layers=9, window=3), num_blocks=8)


def test_a_resume_with_fewer_active_blocks_or_a_shorter_window_trains_no_more_than_it_asks_for():
    many = build_sampler(CoverageSamplerConfig(active_layers=4, window=12), num_blocks=8)
    many.draw(0)
    few = build_sampler(CoverageSamplerConfig(active_layers=1, window=8), num_blocks=8)
    for saved in (many.state_dict(), many.state_dict() | {"periods_left": [3] * 4 + [2] * 4}):
        few.load_state_dict(saved)
        drawn = [few.draw(period) for period in range(1, 30)]
        assert all(len(draw) == 1 for draw in drawn)
        for first in range(len(drawn) - 7):
            assert {block for draw in drawn[first : first + 8] for block in draw} == set(range(8))
