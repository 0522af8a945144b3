import math

import pytest

from lisa_dist.config.method import BanditSamplerConfig
from lisa_dist.sampling import build_sampler


def test_only_what_trained_is_learnt_and_weights_are_exponential():
    sampler = build_sampler(BanditSamplerConfig(active_layers=2, eta=0.5, smoothing=0.25), num_blocks=4)
    assert sampler.needs == "gradient_norms"
    assert [sampler.wants_probe(period) for period in range(3)] == [False, True, True]
    assert sampler.probabilities() == [0.25] * 4

    norms, estimates = [1.0, 2.0, 3.0, 4.0], [0.0] * 4
    for period in range(5):
        for block in sampler.draw(period):
            estimates[block] = 0.25 * norms[block] + 0.75 * estimates[block]
        sampler.observe(norms)
        assert sampler.scores() == pytest.approx(estimates)
        mean = sum(estimates) / 4
        exponentials = [math.exp(0.5 * estimate / mean) for estimate in estimates]
        assert sampler.probabilities() == pytest.approx([value / sum(exponentials) for value in exponentials])


def test_a_block_with_large_gradients_is_drawn_more_often():
    sampler = build_sampler(BanditSamplerConfig(active_layers=1, seed=1), num_blocks=4)
    counts = [0] * 4
    for period in range(500):
        counts[sampler.draw(period)[0]] += 1
        sampler.observe([1.0, 1.0, 4.0, 1.0])
    assert counts[2] == max(counts) and min(counts) > 10
