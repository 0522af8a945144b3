"""Statistics for the tests of the samplers."""

import math


def chi_square(observed: list[int], expected: list[float]) -> float:
    """Pearson's statistic sum (o - e)^2 / e."""
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def chi_square_limit(degrees: int) -> float:
    """The value that chi-square exceeds with probability 0.001 (Wilson and Hilferty's cube approximation)."""
    normal_quantile = 3.0902
    return degrees * (1 - 2 / (9 * degrees) + normal_quantile * math.sqrt(2 / (9 * degrees))) ** 3
