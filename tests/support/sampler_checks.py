"""Statistics for the tests of the samplers."""

import math
from collections import Counter
from collections.abc import Mapping

from lisa_dist.method.sampling.base import Sampler


def chi_square(observed: list[int], expected: list[float]) -> float:
    """Pearson's statistic sum (o - e)^2 / e."""
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def chi_square_limit(degrees: int) -> float:
    """The value that chi-square exceeds with probability 0.001 (Wilson and Hilferty's cube approximation)."""
    normal_quantile = 3.0902
    return degrees * (1 - 2 / (9 * degrees) + normal_quantile * math.sqrt(2 / (9 * degrees))) ** 3


def check_frequencies(sampler: Sampler, law: Mapping[tuple[int, ...], float], draws: int = 4000) -> None:
    """Compare how often each set of blocks is drawn with its chance in one draw; what has none must not be drawn."""
    counts = Counter(tuple(sampler.draw(period)) for period in range(draws))
    chances = {drawn: chance for drawn, chance in law.items() if chance > 0}
    assert counts.keys() <= chances.keys()
    expected = [draws * chance for chance in chances.values()]
    assert chi_square([counts[drawn] for drawn in chances], expected) < chi_square_limit(degrees=len(chances) - 1)
