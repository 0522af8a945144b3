"""The run directory is settled once, and a run in it is never written over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lisa_dist.config import Config, RunConfig, UserError
from lisa_dist.config.loading import to_yaml
from lisa_dist.config.run_directory import RunDirectory, check_run_dir_is_free, resolve_run_dir
from lisa_dist.telemetry.records import record_failure


def test_default_lies_in_runs_under_name_or_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_run_dir(Config(run=RunConfig(name="first"))).run.dir == str(tmp_path / "runs" / "first")
    by_time = resolve_run_dir(Config()).run.dir
    assert by_time is not None and Path(by_time).parent == tmp_path / "runs"
    time.sleep(0.002)
    assert resolve_run_dir(Config()).run.dir != by_time  # two that start in one second are two
    settled = resolve_run_dir(Config(run=RunConfig(dir="out", name="first")))
    assert settled.run.dir == str(tmp_path / "out")
    assert resolve_run_dir(settled) == settled
    assert not any(tmp_path.iterdir())  # nothing is created


def test_its_files_have_the_names_that_other_programs_rely_on(tmp_path: Path) -> None:
    run = RunDirectory.of(Config(run=RunConfig(dir=str(tmp_path))))
    files = [run.config, run.metrics, run.layers, run.summary, run.checkpoints, run.rank_log(0), run.report]
    names = "config.yaml metrics.jsonl layers.jsonl summary.json checkpoints logs/rank_0.log report.html"
    assert [str(file.relative_to(tmp_path)) for file in files] == names.split()
    assert not any(tmp_path.iterdir()), "nothing is created by asking"


RECORDS = ["summary.json", "metrics.jsonl", "layers.jsonl", "events.jsonl"]


def test_what_holds_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.checkpoints.mkdir()
    run.metrics.touch()
    assert not run.holds_run() and not RunDirectory(tmp_path / "absent").holds_run()
    run.metrics.write_text('{"step": 0, "eval_loss": 2.5}\n')
    assert not run.holds_run()  # evaluated, and then it failed before its first step
    run.metrics.write_text('{"step": 1, "loss": 2.5}\n')
    assert run.holds_run()
    run.metrics.unlink()
    (run.checkpoints / "step_00000001").mkdir()
    assert run.holds_run()


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    check_run_dir_is_free(config)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "lock.json").touch()
    (tmp_path / "config.yaml").write_text("train: {}\n")
    (tmp_path / "checkpoints").mkdir()
    check_run_dir_is_free(config)  # a start that failed before its first step may be repeated
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    with pytest.raises(UserError, match=r"run\.dir=.*checkpoint\.resume=auto"):
        check_run_dir_is_free(config)
    config.checkpoint.resume = "auto"
    check_run_dir_is_free(config)


@pytest.mark.parametrize("resume", ["none", "auto"])
@pytest.mark.parametrize("theirs", ["model/model.safetensors", "tokenizer/tokenizer.json", "config.yaml", *RECORDS])
def test_what_no_run_wrote_is_not_replaced(theirs: str, resume: str, tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    config.checkpoint.resume = resume
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("model:\n  path: model\n")
    with pytest.raises(UserError, match=rf"holds {Path(theirs).parts[0]}, which no run wrote"):
        check_run_dir_is_free(config)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "lock.json").touch()  # of a start that failed, which leaves no weights
    if theirs.startswith("model"):
        with pytest.raises(UserError, match="holds model"):
            check_run_dir_is_free(config)
    else:
        check_run_dir_is_free(config)


def test_the_record_of_a_start_that_failed_without_a_lock_may_be_replaced(tmp_path: Path) -> None:
    record_failure(RunDirectory(tmp_path), "no such data")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.5}\n')
    (tmp_path / "layers.jsonl").touch()
    check_run_dir_is_free(Config(run=RunConfig(dir=str(tmp_path))))


def test_the_settings_of_another_run_may_be_laid_there(tmp_path: Path) -> None:
    config = Config(run=RunConfig(dir=str(tmp_path)))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    check_run_dir_is_free(config)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be a directory"):
        check_run_dir_is_free(Config(run=RunConfig(dir=str(tmp_path / "file"))))
