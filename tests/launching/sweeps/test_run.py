"""A sweep on one machine: real jobs, of which one fails and one is stopped, and the sweep run again."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.config import UserError
from lisa_dist.launching.sweeps import run as sweep
from lisa_dist.launching.sweeps.comparison import JobRecord
from lisa_dist.launching.sweeps.jobs import hold_sweep, list_jobs, read_sweep, unfinished
from tests.support.forkserver import FORKSERVER
from tests.support.processes import send_output_to
from tests.support.tiny import TINY, held, read_summary, steps_recorded

PATIENCE = 600  # seconds for what hangs
STEPS, HELD_AT = 12, 4
STOPS_AT = range(HELD_AT, HELD_AT + 3)  # the last held step may still be under way when the signal comes


def table(sweep_dir: Path) -> list[dict[str, str]]:
    with (sweep_dir / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def jobs_of(*overrides: str) -> list[JobRecord]:
    space, config = read_sweep(list(overrides), None)
    return list_jobs(space, Path(str(config.sweep.dir)))


def be_a_sweep(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """Be the command line, in a session of its own."""
    os.setsid()
    send_output_to(output, output)
    os.environ.update(environment)
    sys.exit(main(arguments))


@pytest.mark.e2e
def test_failed_and_stopped_jobs_go_on_when_the_sweep_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep_dir = tmp_path / "sweep"
    arguments = ["train", "--multirun", *TINY, f"train.max_steps={STEPS}", "sampler.period=3,-1"]
    arguments += [f"sweep.dir={sweep_dir}", "sweep.parallel=2"]
    jobs = [sweep_dir / name for name in ("0_period=3", "1_period=-1")]
    told = tmp_path / "output"
    process = FORKSERVER.Process(target=be_a_sweep, args=(arguments, held(HELD_AT, tmp_path / "never"), told))
    process.start()
    deadline = time.monotonic() + PATIENCE
    # The row of a step is written when the next one is under way.
    while len(steps_recorded(jobs[0])) < HELD_AT - 1 or not (jobs[1] / "exit_code").exists():
        assert time.monotonic() < deadline and process.is_alive(), told.read_text()
        time.sleep(0.05)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    process.join(PATIENCE)
    output = told.read_text()
    assert process.exitcode == 1, output
    assert "the jobs save and stop" in output and "job 1 of 2 failed" in output and "at least 1" in output
    assert [(row["state"], row["exit_code"]) for row in table(sweep_dir)] == [("stopped", "75"), ("failed", "2")]
    assert read_summary(jobs[0])["exit_reason"] == "signal"
    assert "at least 1" in read_summary(jobs[1])["exit_reason"]
    saved = len(steps_recorded(jobs[0]))
    assert saved in STOPS_AT

    assert main(arguments) == 1
    rows = table(sweep_dir)
    assert [row["state"] for row in rows] == ["finished", "failed"]
    assert read_summary(jobs[0])["resumed_from"] == [saved]
    assert steps_recorded(jobs[0]) == list(range(1, STEPS + 1))
    assert float(rows[0]["final_loss"]) == read_summary(jobs[0])["final_loss"]
    assert "sampler.period=-1" in rows[1]["reason"] and rows[1]["run_dir"] == str(jobs[1])
    assert "★ best" in (sweep_dir / "index.html").read_text()
    assert "1 failed, 1 finished" in capsys.readouterr().out
    # What has finished is left alone.
    assert [job.number for job in unfinished(jobs_of(*arguments[2:]))] == [1]


def test_other_values_in_the_same_directory(tmp_path: Path) -> None:
    jobs_of("train.seed=1,2", f"sweep.dir={tmp_path}")
    with pytest.raises(UserError, match="holds a sweep over other values"):
        jobs_of("train.seed=1,3", f"sweep.dir={tmp_path}")
    jobs_of("train.seed=1,2", f"sweep.dir={tmp_path}", "sweep.parallel=2")  # how, not what


def test_jobs_that_go_on_are_not_asked_to_begin_anew(tmp_path: Path) -> None:
    anew = ["train.seed=1,2", f"sweep.dir={tmp_path}", "checkpoint.resume=none"]
    read_sweep(anew, None)
    (tmp_path / "jobs.txt").touch()
    read_sweep(anew[:2], None)
    with pytest.raises(UserError, match=f"^checkpoint.resume=none: the jobs in sweep.dir={tmp_path} go on from their"):
        read_sweep(anew, None)


@pytest.mark.parametrize("theirs", ["index.html", "sweep.csv"])
def test_what_no_sweep_wrote_is_not_replaced(theirs: str, tmp_path: Path) -> None:
    (tmp_path / theirs).write_text("mine")
    with pytest.raises(UserError, match=f"holds {theirs}, which no sweep wrote"):
        jobs_of("train.seed=1,2", f"sweep.dir={tmp_path}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_one_process_runs_a_sweep(tmp_path: Path) -> None:
    program = f"import fcntl; f = open({str(tmp_path / '.lock')!r}, 'a'); fcntl.lockf(f, 2); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="another process runs this sweep"):
            hold_sweep(tmp_path)
        other.communicate(b"\n")
    hold_sweep(tmp_path).close()


def test_a_space_of_millions_of_jobs_is_not_listed(tmp_path: Path) -> None:
    many = [f"{key}=range(1,1000)" for key in ("train.seed", "sampler.period", "train.max_steps", "sampler.seed")]
    space, config = read_sweep([*many, "sweep.trials=3"], None)
    assert (len(space), config.sweep.trials) == (5, 3)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.seed=1,2", "train.sede=3"], "did you mean train.seed"),
        (["sampler.period=0,-1"], "sampler.period=0"),
        (["train.seed=1,2", "run.dir=x"], "set sweep.dir instead"),
        (["train.seed=1,2", "sweep.parallel=0"], "sweep.parallel=0"),
        (["train.seed=1,2", "sweep.parallel=1,2"], "sweep.parallel: is the sweep's own key"),
        (["train.seed=1,2", "generate.system='a\nb'"], "must be one line in a sweep"),
        (["optimizer.lr=interval(1,2)"], "set sweep.trials=N to let Optuna choose"),
    ],
)
def test_mistake_in_every_job_ends_the_sweep_before_it_begins(
    overrides: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--multirun", *overrides, f"sweep.dir={tmp_path / 'sweep'}"]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_report_compares_the_jobs_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", f"sweep.dir={tmp_path}"]) == 2
    assert "must be the directory of a sweep" in capsys.readouterr().err
    (tmp_path / "jobs.txt").write_text("make all > it's.log\n")
    assert main(["report", f"sweep.dir={tmp_path}"]) == 2
    assert "no sweep wrote line 1 of its jobs.txt" in capsys.readouterr().err
    (tmp_path / "jobs.txt").unlink()
    jobs_of("train.seed=1,2", f"sweep.dir={tmp_path}")
    (tmp_path / "sweep.csv").unlink()
    assert main(["report", f"sweep.dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/index.html\n"
    assert [(row["job"], row["state"]) for row in table(tmp_path)] == [("0", "stopped"), ("1", "stopped")]


def test_run_directories_are_named_after_what_varies(tmp_path: Path) -> None:
    jobs = jobs_of("train.seed=1", "run.name='a/b',c", "optimizer.lr=0.5", f"sweep.dir={tmp_path}")
    assert [job.run_dir.name for job in jobs] == ["0_name=_a_b_", "1_name=c"]
    jobs = jobs_of("train.seed=1", f"sweep.dir={tmp_path / 'one'}")
    assert [job.run_dir.name for job in jobs] == ["0_job"]


@pytest.mark.parametrize(
    ("visible", "count", "places", "shares"),
    [
        (None, 0, 2, [None, None]),
        (None, 8, 1, [None]),
        (None, 4, 2, ["0,2", "1,3"]),
        ("4,5,6", 3, 2, ["4,6", "5"]),
        ("4", 1, 2, [None, None]),
        ("0,1,", 2, 3, [None, None, None]),
        ("0,1,-1,2", 2, 2, ["0", "1"]),
    ],
)
def test_jobs_side_by_side_share_the_gpus(
    visible: str | None, count: int, places: int, shares: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert sweep._shares_of_gpus(places) == shares
