from itertools import combinations

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import check_frequencies


def test_every_subset_is_equally_likely():
    sampler = build_sampler(UniformSamplerConfig(active_layers=2, seed=3), num_blocks=5)
    check_frequencies(sampler, dict.fromkeys(combinations(range(5), 2), 1 / 10), draws=5000)


def test_draws_are_fresh_each_period_and_depend_on_the_seed():
    def draws(seed):
        sampler = build_sampler(UniformSamplerConfig(active_layers=3, seed=seed), num_blocks=12)
        return [sampler.draw(period) for period in range(20)]

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    assert len({tuple(draw) for draw in draws(0)}) > 10


def test_the_seed_follows_that_of_the_run_unless_set():
    def draws(seed, run_seed):
        sampler = build_sampler(UniformSamplerConfig(active_layers=3, seed=seed), num_blocks=12, seed=run_seed)
        return [sampler.draw(period) for period in range(5)]

    assert draws(None, 3) == draws(3, 3) == draws(3, 4)
    assert draws(None, 3) != draws(None, 4)


@pytest.mark.parametrize("active", [0, 6])
def test_the_extreme_numbers_of_blocks(active):
    sampler = build_sampler(UniformSamplerConfig(active_layers=active), num_blocks=6)
    assert sampler.draw(0) == list(range(active))


def test_more_blocks_than_the_model_has_is_an_error_that_says_so():
    with pytest.raises(UserError, match=r"sampler.active_layers=9: must be at most 6, the number of blocks of this"):
        build_sampler(UniformSamplerConfig(active_layers=9), num_blocks=6)


def test_the_number_of_blocks_must_be_given():
    with pytest.raises(UserError, match=r"sampler.active_layers=null: must be a number for sampler=uniform"):
        build_sampler(UniformSamplerConfig(active_layers=None), num_blocks=6)


def test_a_period_cannot_be_drawn_twice():
    sampler = build_sampler(UniformSamplerConfig(), num_blocks=6)
    sampler.draw(4)
    with pytest.raises(ValueError, match="period 4 was drawn already"):
        sampler.draw(4)
