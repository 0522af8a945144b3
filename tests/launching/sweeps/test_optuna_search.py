"""A sweep whose values Optuna chooses: what it learns from, how it goes on, and a sweep of processes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.config import UserError
from lisa_dist.config.sweeps import read_space
from lisa_dist.launching.sweeps import run as sweep
from lisa_dist.launching.sweeps.comparison import JobRecord
from lisa_dist.launching.sweeps.optuna_search import OptunaSearch
from tests.support.tiny import TINY

STAND_IN = Path(__file__).with_name("stand_in_job.sh")
SPACE = ["sampler=uniform,all", "optimizer.lr=tag(log,interval(1e-5,1e-1))", "sampler.period=int(interval(1,9))"]


@pytest.fixture
def optuna() -> None:
    pytest.importorskip("optuna", reason="needs the extra optuna")


def open_search(sweep_dir: Path, *texts: str) -> OptunaSearch:
    return OptunaSearch(read_space(list(texts or SPACE)), sweep_dir)


def finish(job: JobRecord, loss: float) -> None:
    """Leave what a job leaves that ended well, with this validation loss."""
    job.run_dir.mkdir()
    rows = [{"step": 1, "loss": 9.0}, {"step": 1, "eval_loss": loss}]
    (job.run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (job.run_dir / "exit_code").write_text("0\n")


def value(job: JobRecord, key: str) -> float:
    (text,) = [text for text in job.overrides if text.startswith(f"{key}=")]
    return float(text.partition("=")[2])


def run(search: OptunaSearch, trials: int) -> list[list[str]]:
    """Run jobs whose loss is least at the period 3, in place of training."""
    overrides = []
    for job in search.jobs(trials):
        overrides.append(job.overrides)
        finish(job, 1 + abs(value(job, "sampler.period") - 3))
    return overrides


@pytest.mark.usefixtures("optuna")
def test_values_lie_in_the_space_and_come_nearer_to_the_best(tmp_path: Path) -> None:
    search = open_search(tmp_path)
    run(search, 30)
    jobs = search.record()
    assert len(jobs) == 30 and {job.state for job in jobs} == {"finished"}
    assert all(1e-5 <= value(job, "optimizer.lr") <= 1e-1 for job in jobs)
    assert {job.overrides[0] for job in jobs} == {"sampler=uniform", "sampler=all"}
    periods = [value(job, "sampler.period") for job in jobs]
    assert set(periods) <= set(range(1, 10)) and len(set(periods[:10])) > 3
    assert sum(abs(period - 3) <= 1 for period in periods[15:]) > 10  # by chance 5 of 15
    assert [trial.value for trial in search.study.trials] == [job.eval_loss for job in jobs]


@pytest.mark.usefixtures("optuna")
def test_search_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    whole = run(open_search(tmp_path / "whole"), 14)
    search = open_search(tmp_path / "parts")
    first = run(search, 12)
    broken_off = next(search.jobs(14))  # begun, and killed before its end
    again = open_search(tmp_path / "parts")
    left = run(again, 14)
    assert left[0] == broken_off.overrides and first + left == whole
    with pytest.raises(UserError, match="holds a sweep over other values"):
        open_search(tmp_path / "parts", "sampler.period=1,2")
    (tmp_path / "jobs.txt").touch()
    with pytest.raises(UserError, match="holds a sweep that Optuna did not begin"):
        open_search(tmp_path)


@pytest.mark.usefixtures("optuna")
def test_jobs_of_a_whole_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.sys, "executable", str(STAND_IN))
    space = [*TINY, "sampler.active_layers=1,99", "optimizer.lr=interval(1e-3,1e-2)", f"sweep.dir={tmp_path}"]
    assert main(["train", "--multirun", *space, "sweep.trials=6", "sweep.parallel=2"]) == 1
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"finished", "failed"} and len(rows) == 6
    told = {str(trial.number): trial.value for trial in open_search(tmp_path, *space).study.trials}
    assert told == {row["job"]: float(row["final_loss"]) if row["final_loss"] else None for row in rows}
    assert "★ best" in (tmp_path / "index.html").read_text()
    assert main(["train", "--multirun", *space, "sweep.trials=7"]) == 1  # failed ones again, and one more
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["overrides"] for row in csv.DictReader(file)][:6] == [row["overrides"] for row in rows]


def test_nothing_to_choose(tmp_path: Path, optuna: None) -> None:
    with pytest.raises(UserError, match="there is nothing to choose"):
        open_search(tmp_path, "train.seed=1")


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["train", "--multirun", *SPACE, "sweep.trials=2", f"sweep.dir={tmp_path / 'sweep'}"]) == 2
    assert "pip install optuna" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    assert main(["launch", "slurm", "--multirun", *SPACE, "sweep.trials=2", "launch.dry_run=true"]) == 2
    assert "an array can't wait for" in capsys.readouterr().err
