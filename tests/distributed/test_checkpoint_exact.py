"""A run cut short anywhere and resumed on as many ranks equals the uninterrupted one bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.checkpoint.runs import PERIOD, STEPS, Kill, assert_same_run, make_config, train

SEED = 20240611  # of the points drawn at random


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The directory of an uninterrupted run on 1, 2 and 4 ranks."""
    directories = {}
    for world_size in (1, 2, 4):
        directories[world_size] = tmp_path_factory.mktemp(f"whole_{world_size}")
        train(world_size, make_config(directories[world_size]))
    return directories


def draw_kills(world_size: int) -> list[Kill]:
    """Four points of a run in their order, each of a kind and in a step drawn from the seed."""
    draws = random.Random(SEED + world_size)
    steps = sorted(draws.sample(range(2, STEPS + 1), 4))
    return [Kill(draws.choice(["before", "inside", "saved"]), step) for step in steps]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_random_kill_points(world_size: int, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    train(world_size, make_config(tmp_path), *draw_kills(world_size))
    assert_same_run(tmp_path, uninterrupted[world_size])


@pytest.mark.parametrize("where", ["before", "inside", "saved"])
def test_first_middle_and_last_step_of_a_period(where: str, uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    kills = [Kill(where, PERIOD + 1), Kill(where, PERIOD + 2), Kill(where, 2 * PERIOD)]
    train(2, make_config(tmp_path), *kills)
    assert_same_run(tmp_path, uninterrupted[2])


def test_kill_before_the_first_checkpoint_starts_again(uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    train(2, make_config(tmp_path), Kill("saved", 1))
    assert_same_run(tmp_path, uninterrupted[2])


def test_checkpoints_further_apart_repeat_the_steps_between(uninterrupted: dict[int, Path], tmp_path: Path) -> None:
    train(2, make_config(tmp_path, "checkpoint.every=4"), Kill("inside", 8))
    assert_same_run(tmp_path, uninterrupted[2])
