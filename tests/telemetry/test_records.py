import json
import math
from contextlib import closing

import pytest

from lisa_dist.config import Config, RunConfig
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry import records
from lisa_dist.telemetry.recorder import Recorder
from lisa_dist.telemetry.records import RowWriter, read_rows, read_summary, record_failure, write_summary

LAST = {"epoch": 0.5, "period": 0, "active_layers": [1, 3], "loss": 2.5, "lr": 1e-5, "grad_norm": 0.5}


def test_a_row_is_on_disk_when_the_call_returns(tmp_path):
    recorder = Recorder(Config(run=RunConfig(dir=str(tmp_path / "run"))), 9, num_blocks=4, started=0.0)
    recorder.count_step(tokens=60, label_tokens=10, step_seconds=1.5, data_seconds=0.5, switch_seconds=0.25, flops=6.0)
    parts = {"forward": 1.0, "backward": 2.0}
    recorder.count_step(parts, tokens=40, label_tokens=20, step_seconds=2.5, data_seconds=0.25, flops=2.0)
    recorder.record_step(step=2, **LAST, peak_flops=4.0)
    recorder.record_evaluation(2, 2.25)
    recorder.record_period(0, 1, [1, 3], {1: 2.5, 3: 4.0}, None)
    recorder.record_period(1, 21, [0, 2], {}, [0.5, 0.25])
    recorder.record_event(2, "fault", "not finite")

    row, validation = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row.pop("peak_memory_gib") > 0
    assert row == {
        "step": 2, **LAST, "tokens": 100, "label_tokens": 30, "tokens_per_second": 25.0,
        "label_tokens_per_second": 7.5, "step_seconds": 2.0, "data_seconds": 0.375, "switch_seconds": 0.25, "mfu": 0.5,
        "part_seconds": {"forward": 0.5, "backward": 1.0},
    }  # fmt: skip
    assert validation == {"step": 2, "eval_loss": 2.25}
    assert read_rows(tmp_path / "run" / "layers.jsonl") == [
        {"period": 0, "step": 1, "active_layers": [1, 3], "num_blocks": 4, "weight_norms": {"1": 2.5, "3": 4.0}},
        {"period": 1, "step": 21, "active_layers": [0, 2], "num_blocks": 4, "weight_norms": {}, "scores": [0.5, 0.25]},
    ]
    assert read_rows(tmp_path / "run" / "events.jsonl") == [{"step": 2, "event": "fault", "text": "not finite"}]
    Recorder(Config(run=RunConfig(dir=str(tmp_path / "run"))), 9, num_blocks=4, started=0.0, first_step=1)
    assert read_rows(tmp_path / "run" / "events.jsonl") == [
        {"step": 1, "event": "resume", "text": "went on from step 1"}
    ], "the fault came later, and may not come again"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with closing(RowWriter(RunDirectory(tmp_path))) as writer:
        writer.append(writer.run.metrics, {"loss": math.nan, "grad_norm": math.inf, "parts": {"forward": -math.inf}})
    write_summary(RunDirectory(tmp_path), exit_reason="finished", resumed_from=[], final_loss=math.nan)

    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"loss": None, "grad_norm": None, "parts": {"forward": None}}
    assert read_summary(RunDirectory(tmp_path)) == {"exit_reason": "finished", "resumed_from": [], "final_loss": None}


@pytest.mark.parametrize("losses", [[2.0, math.nan], [math.nan, 2.0], [math.inf, 3.0, 2.0, math.nan]])
def test_the_best_held_out_loss_is_one_that_is_finite(tmp_path, losses):
    recorder = Recorder(Config(run=RunConfig(dir=str(tmp_path))), 9, num_blocks=4, started=0.0)
    for step, loss in enumerate(losses):
        recorder.record_evaluation(step, loss)
    recorder.write_summary("finished")
    assert read_summary(RunDirectory(tmp_path))["best_eval_loss"] == 2.0


def test_resume_cuts_rows_past_the_checkpoint_and_a_torn_last_line(tmp_path):
    run = RunDirectory(tmp_path)
    with closing(RowWriter(run)) as writer:
        for step in range(1, 8):
            writer.append(run.metrics, {"step": step})
        writer.append(run.metrics, {"step": 4, "eval_loss": 1.0})
        writer.append(run.layers, {"step": 1, "active_layers": [0]})
        writer.append(run.layers, {"step": 5, "active_layers": [1]})
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "lo')

    with closing(RowWriter(run)) as writer:
        writer.cut_after(4)
        writer.append(run.metrics, {"step": 5})
        writer.append(run.layers, {"step": 5, "active_layers": [2]})

    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4, 4, 5]
    assert [row["active_layers"] for row in read_rows(run.layers)] == [[0], [2]]
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
    assert read_summary(run) == {"exit_reason": "finished", "resumed_from": [100], "trained_parameters": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "is_main", lambda: False)
    with closing(RowWriter(RunDirectory(tmp_path / "run"))) as writer:
        writer.append(writer.run.metrics, {"step": 1})
        writer.cut_after(0)
    write_summary(RunDirectory(tmp_path / "run"), exit_reason="finished", resumed_from=[])
    assert not (tmp_path / "run").exists()


def test_a_roll_back_to_the_start_counts_no_tokens_of_what_it_drops(tmp_path):
    recorder = Recorder(Config(run=RunConfig(dir=str(tmp_path / "run"))), 9, num_blocks=4, started=0.0)
    for kept in (2, 1):
        for step in range(1, kept + 1):
            recorder.count_step(tokens=60, label_tokens=10, step_seconds=1.5, data_seconds=0.5)
            recorder.record_step(step=step, **LAST)
        assert (recorder.summary["tokens_seen"], recorder.summary["label_tokens_seen"]) == (kept * 60, kept * 10)
        recorder.cut_after(0)


def test_what_the_allocator_had_to_try_again_is_counted_by_row_and_said_once(tmp_path, monkeypatch, caplog):
    found = iter([0, 3, 7])
    monkeypatch.setattr("lisa_dist.telemetry.recorder.allocator_retries", lambda: next(found))
    recorder = Recorder(Config(run=RunConfig(dir=str(tmp_path / "run"))), 9, num_blocks=4, started=0.0)
    for step in (1, 2, 3):
        recorder.count_step(tokens=60, label_tokens=10, step_seconds=1.5, data_seconds=0.5)
        recorder.record_step(step=step, **LAST)
    recorder.write_summary("finished")
    assert [row["allocator_retries"] for row in read_rows(recorder.run.metrics)] == [0, 3, 4]
    assert json.loads(recorder.run.summary.read_text())["allocator_retries"] == 7
    assert caplog.text.count("(3 times so far)") == caplog.text.count("times so far") == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_norms": 3}'])
def test_a_damaged_summary_hides_no_failure_and_ends_no_resume(tmp_path, text, caplog):
    run = RunDirectory(tmp_path)
    run.summary.write_text(text)
    Recorder(Config(run=RunConfig(dir=str(tmp_path))), 9, num_blocks=4, started=0.0, first_step=1)
    record_failure(run, "no memory")
    assert read_summary(run) == {"resumed_from": [], "exit_reason": "failed: no memory"}
    assert caplog.text.count(f"what the run's summary said is lost, for it is damaged: {run.summary}: ") == 2


def test_a_resume_says_until_when_held_out_losses_are_of_other_rows(tmp_path):
    config = Config(run=RunConfig(dir=str(tmp_path)))
    Recorder(config, 9, num_blocks=4, started=0.0, first_step=3, evaluated_since=2)
    assert read_rows(tmp_path / "events.jsonl") == [
        {"step": 3, "event": "resume", "text": "went on from step 3", "evaluated_since": 2}
    ]


def test_a_full_disk_is_told_with_the_file_and_closing_says_no_more(tmp_path):
    run = RunDirectory(tmp_path)
    run.events.symlink_to("/dev/full")
    with closing(RowWriter(run)) as writer, pytest.raises(OSError, match=rf"No space left on device: '{run.events}'$"):
        writer.append(run.events, {"step": 1})
