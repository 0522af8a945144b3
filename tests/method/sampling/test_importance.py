import math

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.sampling import ImportanceSamplerConfig
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import check_frequencies


def test_the_papers_numbers_are_the_defaults():
    sampler = build_sampler(ImportanceSamplerConfig(), num_blocks=32)
    assert sampler.num_active == 8 and len(sampler.draw(0)) == 8
    sets = sampler.suppressed_sets()
    assert [len(blocks) for blocks in sets] == [16, 16, 16]
    assert len({tuple(blocks) for blocks in sets}) == 3
    assert sampler.suppressed_sets() == sets  # the same until they are scored
    sampler.observe([1.0, 1.0, 1.0])
    assert sampler.suppressed_sets() != sets


def test_active_layers_counts_where_it_is_given():
    assert len(build_sampler(ImportanceSamplerConfig(active_layers=3), num_blocks=32).draw(0)) == 3
    assert build_sampler(ImportanceSamplerConfig(), num_blocks=3).num_active == 1


def test_scores_move_by_the_reward_of_the_sets_they_were_in():
    sampler = build_sampler(ImportanceSamplerConfig(score_lr=10.0), num_blocks=4)
    scores = [0.0] * 4
    for losses in ([1.0, 2.0, 3.0], [2.5, 0.5, 1.0]):
        sets = sampler.suppressed_sets()
        rewards = [math.exp(-loss) for loss in losses]
        rewards = [reward - sum(rewards) / 3 for reward in rewards]
        for block in range(4):
            sigma = 1 / (1 + math.exp(-scores[block]))
            scores[block] += sum(
                10 * reward * sigma * (1 - sigma) for reward, blocks in zip(rewards, sets) if block in blocks
            )
        sampler.observe(losses)
        assert sampler.scores() == pytest.approx(scores)
    assert max(map(abs, scores)) > 0.01


def test_blocks_train_in_proportion_to_sigmoid_of_minus_the_score():
    sampler = build_sampler(ImportanceSamplerConfig(active_layers=1, seed=6), num_blocks=3)
    sampler.unimportance = [2.0, 0.0, -1.0]
    weights = [1 / (1 + math.exp(score)) for score in (2.0, 0.0, -1.0)]
    check_frequencies(sampler, {(block,): weight / sum(weights) for block, weight in enumerate(weights)}, draws=3000)


def test_probes_come_every_so_many_periods_but_not_before_the_first():
    sampler = build_sampler(ImportanceSamplerConfig(probe_every=2), num_blocks=8)
    request = sampler.request()
    assert (request.kind, request.batches, request.settings["factor"]) == ("suppressed_losses", 1, 0.25)
    assert request.settings["sets"] == sampler.suppressed_sets() and sampler.request() == request
    assert [period for period in range(7) if sampler.wants_probe(period)] == [2, 4, 6]


def test_more_sets_than_there_are_is_an_error_that_says_so():
    with pytest.raises(UserError, match=r"sampler.suppressed_sets=3: must be at most 2, .* sets of 1 of the 2 blocks"):
        build_sampler(ImportanceSamplerConfig(), num_blocks=2)
