import pytest

from lisa_dist.config.sampling import OutlierSamplerConfig, ProbeRequest
from lisa_dist.method.sampling import build_sampler
from tests.support.sampler_checks import chi_square, chi_square_limit

SHARES = [0.004, 0.001, 0.002, 0.003]


@pytest.mark.parametrize(
    ("reverse", "weights"),
    [(False, [4, 1, 2, 3]), (True, [0, 3, 2, 1])],  # max(D) - D
)
def test_blocks_are_drawn_by_their_share_of_outliers(reverse, weights):
    sampler = build_sampler(OutlierSamplerConfig(active_layers=1, reverse=reverse, seed=4), num_blocks=4)
    sampler.observe(SHARES)
    counts = [0] * 4
    for period in range(4000):
        counts[sampler.draw(period)[0]] += 1
    possible = [index for index in range(4) if weights[index]]
    assert all(counts[index] == 0 for index in range(4) if not weights[index])
    expected = [4000 * weights[index] / sum(weights) for index in possible]
    assert chi_square([counts[index] for index in possible], expected) < chi_square_limit(len(possible) - 1)


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
    counts = [0] * 4
    for period in range(2000):
        counts[sampler.draw(period)[0]] += 1
    assert chi_square(counts, [500.0] * 4) < chi_square_limit(degrees=3)


def test_a_block_without_outliers_fills_the_draw_only_when_nothing_else_is_left():
    sampler = build_sampler(OutlierSamplerConfig(active_layers=2), num_blocks=3)
    sampler.observe([0.1, 0.0, 0.0])
    drawn = [sampler.draw(period) for period in range(50)]
    assert all(0 in draw for draw in drawn)
    assert {tuple(draw) for draw in drawn} == {(0, 1), (0, 2)}
