"""A run cut short anywhere and resumed on as many ranks equals the uninterrupted one bit for bit."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lisa_dist.config import Config
from tests.support.runs import STEPS, Kill, assert_same_run, make_config, train

PERIOD = 3
SEED = 20240611  # of the points drawn at random


def two_each(run_dir: Path, world_size: int, *overrides: str) -> Config:
    """A run of two periods in which every rank has two micro-batches a step."""
    return make_config(run_dir, f"train.global_batch_size={2 * world_size}", f"sampler.period={PERIOD}", *overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The directory of the uninterrupted run on a number of ranks."""

    @functools.cache
    def whole(world_size: int) -> Path:
        run_dir = tmp_path_factory.mktemp("whole")
        train(world_size, two_each(run_dir, world_size))
        return run_dir

    return whole


def draw_kills(world_size: int) -> list[Kill]:
    """Three points of a run in their order, each of a kind and in a step drawn from the seed."""
    draws = random.Random(SEED + world_size)
    steps = sorted(draws.sample(range(2, STEPS + 1), 3))
    return [Kill(draws.choice(["before", "inside", "saved"]), step) for step in steps]


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_random_kill_points(world_size: int, uninterrupted: Callable[[int], Path], tmp_path: Path) -> None:
    train(world_size, two_each(tmp_path, world_size), *draw_kills(world_size))
    assert_same_run(tmp_path, uninterrupted(world_size))


EVERY_PLACE = [Kill(where, PERIOD + step) for step in (1, 2, 3) for where in ("before", "inside", "saved")]


# A kill before a step is what tests of checkpoint.full_every begin with.
@pytest.mark.parametrize(
    "kills", [EVERY_PLACE[4::4], pytest.param(EVERY_PLACE, marks=pytest.mark.soak)], ids=["two places", "all"]
)
def test_first_middle_and_last_step_of_a_period(
    kills: list[Kill], uninterrupted: Callable[[int], Path], tmp_path: Path
) -> None:
    """One run that is cut short before, inside and while saving the steps of its second period."""
    train(2, two_each(tmp_path, 2), *kills)
    assert_same_run(tmp_path, uninterrupted(2))


def test_steps_since_the_last_checkpoint_are_repeated(uninterrupted: Callable[[int], Path], tmp_path: Path) -> None:
    """All of them where the first checkpoint was never finished, then those since the second step."""
    train(1, two_each(tmp_path, 1, "checkpoint.every=2"), Kill("saved", 2), Kill("inside", 4))
    assert_same_run(tmp_path, uninterrupted(1))
