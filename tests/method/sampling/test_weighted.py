from itertools import permutations

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import ProbeRequest, WeightedSamplerConfig
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import check_frequencies


def sequential_law(weights, count):
    """The chance of every set: the sum over its orders of the product of renormalised weights."""
    law = {}
    for order in permutations(range(len(weights)), count):
        chance, left = 1.0, sum(weights)
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        law[tuple(sorted(order))] = law.get(tuple(sorted(order)), 0.0) + chance
    return law


@pytest.mark.parametrize(
    ("law", "given", "weights"),
    [
        ("increasing", [], [1, 2, 3, 4, 5]),
        ("decreasing", [], [5, 4, 3, 2, 1]),
        ("given", [4.0, 1.0, 1.0, 8.0, 2.0], [4, 1, 1, 8, 2]),
    ],
)
def test_sets_are_drawn_by_the_sequential_law(law, given, weights):
    config = WeightedSamplerConfig(active_layers=2, law=law, weights=given, seed=1)
    check_frequencies(build_sampler(config, num_blocks=5), sequential_law(weights, 2))


def test_weight_norms_are_averaged_over_the_probes():
    sampler = build_sampler(WeightedSamplerConfig(active_layers=1, law="weight_norm"), num_blocks=3)
    assert sampler.request() == ProbeRequest("weight_norms") and sampler.wants_probe(0) and sampler.wants_probe(7)
    sampler.observe([1.0, 2.0, 3.0])
    sampler.observe([3.0, 2.0, 9.0])
    assert sampler.scores() == [2.0, 2.0, 6.0]
    check_frequencies(sampler, sequential_law([2, 2, 6], 1))


def test_the_ratio_of_norms_is_the_equation_of_lisa():
    config = WeightedSamplerConfig(active_layers=1, law="weight_norm_ratio", weights=[1.0, 6.0, 4.0])
    sampler = build_sampler(config, num_blocks=3)
    sampler.observe([2.0, 2.0, 8.0])  # w~ / w = 0.5, 3, 0.5
    check_frequencies(sampler, sequential_law([0.5, 3.0, 0.5], 1))


def test_blocks_of_weight_zero_are_not_drawn():
    sampler = build_sampler(WeightedSamplerConfig(law="given", weights=[1.0, 0.0, 2.0]), num_blocks=3)
    assert all(sampler.draw(period) == [0, 2] for period in range(50))


@pytest.mark.parametrize(
    ("law", "weights", "message"),
    [
        ("increase", [], "sampler.law=increase: must be one of .*did you mean increasing"),
        ("given", [], r"sampler.weights=\[\]: sampler.law=given needs one number for each block"),
        ("increasing", [1.0], r"sampler.weights=\[1.0\]: sampler.law=increasing reads no weights"),
        ("given", [1.0, -1.0], "must not be negative"),
        ("given", [1.0, 2.0], "must be 3 numbers, one for each block"),
        ("given", [1.0, 0.0, 0.0], "only 1 are above 0, fewer than sampler.active_layers=2"),
    ],
)
def test_mistakes_are_named(law, weights, message):
    with pytest.raises(UserError, match=message):
        build_sampler(WeightedSamplerConfig(law=law, weights=weights), num_blocks=3)


def test_weight_norms_must_be_observed_first():
    with pytest.raises(ValueError, match="needs a probe"):
        build_sampler(WeightedSamplerConfig(law="weight_norm"), num_blocks=3).draw(0)
