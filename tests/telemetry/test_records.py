import json
import math

import pytest

from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry import records
from lisa_dist.telemetry.records import MetricsWriter, read_rows, read_summary, write_summary

STEP = {
    "epoch": 0.5, "period": 0, "active_layers": [1, 3], "loss": 2.5, "lr": 1e-5, "grad_norm": 0.5, "tokens": 100,
    "label_tokens": 30, "step_seconds": 2.0, "data_seconds": 0.5, "peak_memory_gib": 1.5,
}  # fmt: skip


def test_a_row_is_on_disk_when_the_call_returns(tmp_path):
    writer = MetricsWriter(RunDirectory(tmp_path / "run"))
    writer.write_step(step=1, **STEP)
    writer.write_eval(step=1, eval_loss=2.25)
    writer.write_period(period=0, step=1, active_layers=[1, 3], num_blocks=4)
    writer.write_period(period=1, step=21, active_layers=[0, 2], num_blocks=4, scores=[0.5, 0.25])

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "step": 1, **STEP, "tokens_per_second": 50.0, "label_tokens_per_second": 15.0
    }  # fmt: skip
    assert json.loads(lines[1]) == {"step": 1, "eval_loss": 2.25}
    assert read_rows(tmp_path / "run" / "layers.jsonl") == [
        {"period": 0, "step": 1, "active_layers": [1, 3], "num_blocks": 4},
        {"period": 1, "step": 21, "active_layers": [0, 2], "num_blocks": 4, "scores": [0.5, 0.25]},
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsWriter(RunDirectory(tmp_path)) as writer:
        writer.write_step(step=1, **{**STEP, "loss": math.nan, "grad_norm": math.inf}, parts={"forward": -math.inf})
    write_summary(RunDirectory(tmp_path), exit_reason="finished", resumed_from=[], final_loss=math.nan)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert (row["loss"], row["grad_norm"], row["parts"]) == (None, None, {"forward": None})
    assert read_summary(RunDirectory(tmp_path)) == {"exit_reason": "finished", "resumed_from": [], "final_loss": None}


def test_resume_cuts_rows_past_the_checkpoint_and_a_torn_last_line(tmp_path):
    with MetricsWriter(RunDirectory(tmp_path)) as writer:
        for step in range(1, 8):
            writer.write_step(step=step, **STEP)
        writer.write_eval(step=4, eval_loss=1.0)
        writer.write_period(period=0, step=1, active_layers=[0], num_blocks=4)
        writer.write_period(period=1, step=5, active_layers=[1], num_blocks=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')

    with MetricsWriter(RunDirectory(tmp_path)) as writer:
        writer.cut_after(4)
        writer.write_step(step=5, **STEP)
        writer.write_period(period=1, step=5, active_layers=[2], num_blocks=4)

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5]
    assert [row["active_layers"] for row in read_rows(tmp_path / "layers.jsonl")] == [[0], [2]]
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_line_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_rows(path)


def test_summary_replaces_the_old_one_whole(tmp_path):
    run = RunDirectory(tmp_path)
    write_summary(run, exit_reason="signal", resumed_from=[])
    write_summary(run, exit_reason="finished", resumed_from=[100], trained_parameters=7)
    assert read_summary(run) == {
        "exit_reason": "finished",
        "resumed_from": [100],
        "trained_parameters": 7,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "is_main", lambda: False)
    with MetricsWriter(RunDirectory(tmp_path / "run")) as writer:
        assert writer.write_step(step=1, **STEP)["step"] == 1
        writer.write_period(period=0, step=1, active_layers=[], num_blocks=4)
        writer.cut_after(0)
    write_summary(RunDirectory(tmp_path / "run"), exit_reason="finished", resumed_from=[])
    assert not (tmp_path / "run").exists()
