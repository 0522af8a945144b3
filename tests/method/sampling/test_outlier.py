import pytest

from lisa_dist.config.sampling import OutlierSamplerConfig, ProbeRequest
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import check_frequencies

SHARES = [0.004, 0.001, 0.002, 0.003]


@pytest.mark.parametrize(
    ("reverse", "weights"),
    [(False, [4, 1, 2, 3]), (True, [0, 3, 2, 1])],  # max(D) - D
)
def test_blocks_are_drawn_by_their_share_of_outliers(reverse, weights):
    sampler = build_sampler(OutlierSamplerConfig(active_layers=1, reverse=reverse, seed=4), num_blocks=4)
    sampler.observe(SHARES)
    check_frequencies(sampler, {(block,): weight / sum(weights) for block, weight in enumerate(weights)})


def test_outliers_are_measured_once_before_the_first_draw():
    sampler = build_sampler(OutlierSamplerConfig(), num_blocks=4)
    assert sampler.request() == ProbeRequest("outlier_shares", 4, {"threshold": 13.0})
    assert [period for period in range(5) if sampler.wants_probe(period)] == [0]
    with pytest.raises(ValueError, match="needs a probe"):
        sampler.draw(0)


def test_a_model_without_outliers_is_drawn_from_uniformly_which_is_said(caplog):
    sampler = build_sampler(OutlierSamplerConfig(active_layers=1), num_blocks=4)
    sampler.observe([0.0, 0.0, 0.0, 0.1])
    assert caplog.text == ""
    sampler.observe([0.0] * 4)
    assert "nothing is above sampler.threshold=13 times the mean, so blocks are drawn uniformly" in caplog.text
    check_frequencies(sampler, {(block,): 1 / 4 for block in range(4)}, draws=2000)


def test_a_block_without_outliers_fills_the_draw_only_when_nothing_else_is_left():
    sampler = build_sampler(OutlierSamplerConfig(active_layers=2), num_blocks=3)
    sampler.observe([0.1, 0.0, 0.0])
    drawn = [sampler.draw(period) for period in range(50)]
    assert all(0 in draw for draw in drawn)
    assert {tuple(draw) for draw in drawn} == {(0, 1), (0, 2)}
