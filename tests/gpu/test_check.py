"""``tests.gpu.check`` itself, on a CPU: what it runs, that its checks notice wrong numbers, and what it writes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.config.loading import load
from tests.gpu import check, matrix
from tests.support.families import FAMILIES
from tests.support.ranks import run_on_ranks


def checked(folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of the tiny check, and what it writes. Runs on a rank."""
    output = folder / "found.json"
    code = check.main(["--tiny", "--output", str(output), *arguments])
    return code, json.loads(output.read_text())["checks"]


def test_some_of_every_kind_pass(tmp_path: Path) -> None:
    names = ["lisa", "offload frozen", "resume lisa", "report", "family llama"]
    ((code, found),) = run_on_ranks(1, checked, tmp_path, names)
    assert code == 0 and list(found) == names
    assert all(result["state"] == "ok" for result in found.values())
    assert "bit for bit" in found["resume lisa"]["found"]


@pytest.mark.soak
def test_checks_in_processes_of_their_own_are_reported(tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    assert check.main(["--tiny", "--processes", "2", "--output", str(output), "family llama"]) == 0
    found = json.loads(output.read_text())["checks"]
    assert list(found) == ["family llama"] and found["family llama"]["state"] == "ok"


def wrong_numbers(folder: Path) -> list[str]:
    """What checks say of runs that are not as they should be. Runs on a rank."""
    said = []
    small = matrix.Matrix(folder, tiny=True)
    for attempt in (
        lambda: matrix.changes_nothing(small, [], ["optimizer.lr=0.005"]),
        lambda: matrix.learns(small, ["optimizer.lr=0"]),
    ):
        with pytest.raises(AssertionError) as caught:
            attempt()
        said.append(str(caught.value))
    return said


def test_wrong_numbers_are_noticed_and_what_was_not_reached_fails(tmp_path: Path) -> None:
    (said,) = run_on_ranks(1, wrong_numbers, tmp_path)
    assert len(said) == 2
    ((code, found),) = run_on_ranks(1, checked, tmp_path, ["--seconds", "0", "lisa", "benchmark"])
    assert code == 1
    assert {result["state"] for result in found.values()} == {"not run"}


def test_every_line_of_the_matrix_is_a_configuration(tmp_path: Path) -> None:
    pairs = [*matrix.CHANGES_NOTHING.values(), *matrix.ON_A_GPU.values()]
    for overrides in [*matrix.LEARNS.values(), *matrix.RESUMED.values(), *([*base, *more] for base, more in pairs)]:
        load([*matrix.BASE, *overrides])
    found = matrix.checks(matrix.Matrix(tmp_path, tiny=False))
    kinds = [matrix.LEARNS, matrix.CHANGES_NOTHING, matrix.ON_A_GPU, matrix.RESUMED, FAMILIES]
    assert len(found) == sum(map(len, kinds)) + 4, "none hides another of the same name"


@pytest.mark.soak
def test_the_whole_check_passes_on_a_small_model(tmp_path: Path) -> None:
    ((_, found),) = run_on_ranks(1, checked, tmp_path, ["--seconds", "3000"])
    failed = {name: result for name, result in found.items() if result["state"] != "ok"}
    if find_spec("torchao") is None:  # which the tests are installed without
        for name in ("adamw8bit", "resume 8 bit"):
            assert "optimizer=adamw8bit: needs torchao" in failed.pop(name)["found"]
    assert not failed
