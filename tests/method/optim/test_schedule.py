from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lisa_dist.config import SchedulerConfig
from lisa_dist.method.optim.schedule import learning_rate


def test_warmup_reaches_the_base_rate_and_cosine_falls_to_the_floor() -> None:
    config = SchedulerConfig(name="cosine", warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, 2.0, step, 24) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[24] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))


def test_linear_and_constant() -> None:
    assert learning_rate(SchedulerConfig(name="linear"), 1.0, 5, 10) == pytest.approx(0.5)
    assert learning_rate(SchedulerConfig(name="linear"), 1.0, 10, 10) == 0
    assert learning_rate(SchedulerConfig(name="constant"), 1.0, 9, 10) == 1.0
