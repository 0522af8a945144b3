"""A run cut short anywhere and resumed on as many ranks equals the uninterrupted one bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lisa_dist.config import Config
from tests.support.runs import PERIOD, STEPS, Kill, assert_same_run, make_config, train

SEED = 20240611  # of the points drawn at random


def two_each(run_dir: Path, world_size: int, *overrides: str) -> Config:
    """A run in which every rank has two micro-batches a step."""
    return make_config(run_dir, f"train.global_batch_size={2 * world_size}", *overrides)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of an uninterrupted run on 1, 2 and 4 ranks."""
    directories = {}
    for world_size in (1, 2, 4):
        directories[world_size] = tmp_path_factory.mktemp(f"whole_{world_size}")
        train(world_size, two_each(directories[world_size], world_size))
    return directories


def draw_kills(world_size: int) -> list[Kill]:
    """Three points of a run in their order, each of a kind and in a step drawn from the seed."""
    draws = random.Random(SEED + world_size)
    steps = sorted(draws.sample(range(2, STEPS + 1), 3))
    return [Kill(draws.choice(["before", "inside", "saved"]), step) for step in steps]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_random_kill_points(world_size: int, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    train(world_size, two_each(tmp_path, world_size), *draw_kills(world_size))
    assert_same_run(tmp_path, uninterrupted[world_size])


def test_first_middle_and_last_step_of_a_period(uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """One run that is cut short before, inside and while saving a step of each place in its period."""
    kills = [Kill("before", 2), Kill("inside", 3), Kill("saved", 4), Kill("inside", 5), Kill("before", 6)]
    kills += [Kill("before", 7), Kill("inside", 7), Kill("saved", 8), Kill("saved", 9)]
    assert len({(kill.where, kill.step % PERIOD) for kill in kills}) == 9
    train(2, two_each(tmp_path, 2), *kills)
    assert_same_run(tmp_path, uninterrupted[2])


def test_steps_since_the_last_checkpoint_are_repeated(uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    """All of them where the first checkpoint was never finished, then those since the fourth step."""
    train(2, two_each(tmp_path, 2, "checkpoint.every=4"), Kill("saved", 4), Kill("inside", 8))
    assert_same_run(tmp_path, uninterrupted[2])
