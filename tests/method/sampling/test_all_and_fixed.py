import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import AllSamplerConfig, FixedSamplerConfig
from lisa_dist.method.sampling import build_sampler


def test_all_trains_every_block():
    sampler = build_sampler(AllSamplerConfig(active_layers=99), num_blocks=4)
    assert [sampler.draw(0), sampler.draw(1)] == [[0, 1, 2, 3]] * 2
    assert sampler.num_active == 4


def test_fixed_trains_the_listed_blocks():
    sampler = build_sampler(FixedSamplerConfig(blocks=[5, 0]), num_blocks=6)
    assert [sampler.draw(0), sampler.draw(7)] == [[0, 5]] * 2
    assert sampler.num_active == 2


def test_fixed_refuses_blocks_that_do_not_exist():
    with pytest.raises(UserError, match=r"sampler.blocks=\[0, 6\]: 6 must be at most 5"):
        build_sampler(FixedSamplerConfig(blocks=[0, 6]), num_blocks=6)
    with pytest.raises(UserError, match=r"sampler.blocks=\[\]"):
        build_sampler(FixedSamplerConfig(), num_blocks=6)
    for blocks in ([1, 1], [-1]):
        with pytest.raises(UserError, match=r"sampler.blocks"):
            FixedSamplerConfig(blocks=blocks)
