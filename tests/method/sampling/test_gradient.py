import math

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import GradientSamplerConfig
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import check_frequencies


def expected_probabilities(norms, temperature):
    mean = sum(norms) / len(norms)
    exponentials = [math.exp(norm / mean / temperature) for norm in norms]
    return [value / sum(exponentials) for value in exponentials]


def test_first_draws_follow_the_softmax_of_the_norms():
    norms = [1e-4, 4e-4, 2e-4, 5e-4]
    sampler = build_sampler(GradientSamplerConfig(active_layers=1, temperature=0.5, probe_every=9999), num_blocks=4)
    sampler.observe(norms)
    expected = expected_probabilities(norms, 0.5)
    assert sampler.probabilities() == pytest.approx(expected)
    check_frequencies(sampler, {(block,): chance for block, chance in enumerate(expected)})


def test_only_blocks_that_trained_move_by_the_moving_average():
    sampler = build_sampler(GradientSamplerConfig(active_layers=1, smoothing=0.25, probe_every=2), num_blocks=4)
    assert [sampler.wants_probe(period) for period in range(4)] == [True, False, True, False]
    sampler.observe([1.0, 2.0, 3.0, 4.0])
    trained = {sampler.draw(0)[0], sampler.draw(1)[0]}
    sampler.observe([10.0, 20.0, 30.0, 40.0])
    expected = [0.25 * 10 * n + 0.75 * n if n - 1 in trained else float(n) for n in (1, 2, 3, 4)]
    assert sampler.scores() == pytest.approx(expected)


def test_gradients_of_zero_are_drawn_uniformly():
    sampler = build_sampler(GradientSamplerConfig(), num_blocks=4)
    sampler.observe([0.0] * 4)
    assert sampler.probabilities() == [0.25] * 4


def test_what_cannot_be_used_is_refused():
    sampler = build_sampler(GradientSamplerConfig(), num_blocks=3)
    with pytest.raises(ValueError, match="needs a probe"):
        sampler.draw(0)
    with pytest.raises(ValueError, match="expects 3 scores and got 2"):
        sampler.observe([1.0, 2.0])
    with pytest.raises(ValueError, match="not finite"):
        sampler.observe([1.0, math.nan, 2.0])
    with pytest.raises(UserError, match=r"sampler.temperature=0: must be above 0"):
        GradientSamplerConfig(temperature=0)
