from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

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


@pytest.mark.parametrize(
    ("name", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
def test_rates_are_those_of_transformers_and_a_step_ahead_in_the_warmup(name: str, theirs: str) -> None:
    rates = [learning_rate(SchedulerConfig(name=name, warmup_steps=4), 2.0, step, 12) for step in range(12)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=4, num_training_steps=12)
    expected = [scheduler.lr_lambdas[0](step) * 2.0 for step in range(12)]
    assert rates[:4] == expected[1:5] and rates[4:] == pytest.approx(expected[4:])


def test_linear_and_constant() -> None:
    assert learning_rate(SchedulerConfig(name="linear"), 1.0, 5, 10) == pytest.approx(0.5)
    assert learning_rate(SchedulerConfig(name="linear"), 1.0, 10, 10) == 0
    assert learning_rate(SchedulerConfig(name="constant"), 1.0, 9, 10) == 1.0
