"""The golden runs again: the same losses and weights, bit for bit where the file was made, else within rounding."""

from __future__ import annotations

import json
import warnings

import pytest

from tests.golden.runs import FILE, RUNS, made_with, make

GOLDEN = json.loads(FILE.read_text())
# What other kernels may differ by: a few times what torch's, oneDNN's and MKL's plainest ones were seen to.
FLOAT32 = {"losses": 1e-6, "eval_losses": 1e-6, "weight_norms": 1e-5, "grad_norms": 1e-5}
BFLOAT16 = {"losses": 5e-3, "eval_losses": 5e-3, "weight_norms": 2e-2, "grad_norms": 5e-2}


def test_the_file_holds_the_golden_runs_and_no_other() -> None:
    assert list(GOLDEN["runs"]) == list(RUNS), "write the file anew: python -m tests.golden"
    if made_with() != GOLDEN["made_with"]:
        warnings.warn(
            f"golden runs are compared within rounding, not bit for bit: made with {GOLDEN['made_with']}, "
            f"here {made_with()}",
            stacklevel=1,
        )


@pytest.mark.parametrize("name", RUNS)
def test_a_golden_run_gives_the_recorded_numbers(name: str) -> None:
    found, expected = make(name), GOLDEN["runs"][name]
    if made_with() == GOLDEN["made_with"]:
        assert found == expected
        return
    assert found["active_layers"] == expected["active_layers"]
    assert found["weight_norms"].keys() == expected["weight_norms"].keys()
    # No checksum: other kernels give other last bits.
    for figure, tolerance in (FLOAT32 if RUNS[name].float32 else BFLOAT16).items():
        assert found[figure] == pytest.approx(expected[figure], rel=tolerance), figure
