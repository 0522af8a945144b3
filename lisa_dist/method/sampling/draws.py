"""Random draws that samplers share. They call ``Random.random()`` only: the one method whose numbers stay
the same from one version of Python to the next, so a run resumed under a newer Python draws the same blocks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def draw_without_replacement(generator: random.Random, weights: Sequence[float], count: int) -> list[int]:
    """Draw ``count`` different indices one after the other, each in proportion to the weights of those left.

    This is the law of ``numpy.random.choice(replace=False, p=...)`` and of ``torch.multinomial``: sequential
    draws with the probabilities renormalised. The chance of an index to be among the ``count`` is therefore
    not ``count`` times its probability, except where all weights are equal. Indices of weight zero are drawn
    only when nothing else is left, and then uniformly.

    Raises:
        ValueError: a weight is negative or not finite, or fewer than ``count`` indices exist.
    """
    if count > len(weights):
        raise ValueError(f"cannot draw {count} of {len(weights)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and not negative: {list(weights)}")
    left = list(range(len(weights)))
    chosen: list[int] = []
    for _ in range(count):
        candidates = [index for index in left if weights[index] > 0] or left
        chosen.append(_draw_one(generator, candidates, weights))
        left.remove(chosen[-1])
    return chosen


def _draw_one(generator: random.Random, candidates: list[int], weights: Sequence[float]) -> int:
    total = math.fsum(weights[index] for index in candidates)
    if total == 0:
        return candidates[int(generator.random() * len(candidates))]
    threshold = generator.random() * total
    cumulative = 0.0
    for index in candidates:
        cumulative += weights[index]
        if threshold < cumulative:
            return index
    return candidates[-1]  # the sum was rounded below the threshold


def draw_uniformly(generator: random.Random, candidates: Sequence[int], count: int) -> list[int]:
    """Draw ``count`` different elements of ``candidates``, each subset being equally likely, in random order."""
    left = list(candidates)
    if count > len(left):
        raise ValueError(f"cannot draw {count} of {len(left)}")
    return [left.pop(int(generator.random() * len(left))) for _ in range(count)]


def softmax(values: Sequence[float]) -> list[float]:
    """Return exp(v) / sum exp(v), computed without overflow."""
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    total = math.fsum(exponentials)
    return [value / total for value in exponentials]


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-v)), computed without overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))
