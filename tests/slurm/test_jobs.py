"""Jobs in a real Slurm: to the end over two nodes, through a time limit's signal, as an array, and cancelled."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.config.loading import load
from lisa_dist.training.loop import train
from tests.support.cluster import Cluster
from tests.support.ranks import run_on_ranks
from tests.support.tiny import TINY, held, read_summary, steps_recorded, weights

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
STEPS, HELD_AT = 12, 4
STOPS_AT = range(HELD_AT, HELD_AT + 3)  # the last held step may still be under way when the signal comes
SMALL = 'launch.options=["--mem=100M"]'  # a job without it takes the memory of a whole node
SWEPT = [*TINY, SMALL, f"train.max_steps={STEPS}", "sampler.period=3,-1"]


def launch(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Submit with ``lisa-dist launch slurm`` and return the job's id."""
    assert main(["launch", "slurm", *TINY, SMALL, *overrides]) == 0
    match = re.search(r"submitted as job (\d+)", capsys.readouterr().out)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def sweep_dir(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep as a job array, a rank each job, the second with a mistake."""
    sweep_dir = tmp_path_factory.mktemp("slurm") / "sweep"
    assert main(["launch", "slurm", "--multirun", *SWEPT, f"sweep.dir={sweep_dir}"]) == 0
    job = cluster.command("squeue", "-h", "-r", "-o", "%F", "--name=sweep").split()[0]
    good, bad = (cluster.wait_for_state(f"{job}_{task}", "COMPLETED", "FAILED") for task in (0, 1))
    assert (good["JobState"], good["ExitCode"]) == ("COMPLETED", "0:0")
    assert (bad["JobState"], bad["ExitCode"]) == ("FAILED", "2:0")
    return sweep_dir


def test_array_over_a_sweep(sweep_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (sweep_dir / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["state"], row["exit_code"]) for row in rows] == [("finished", "0"), ("failed", "2")]
    assert "sampler.period=-1" in rows[1]["reason"]
    uninterrupted = sweep_dir / "0_period=3"
    assert read_summary(uninterrupted)["exit_reason"] == "finished"
    assert steps_recorded(uninterrupted) == list(range(1, STEPS + 1))
    # Only what has not finished is submitted again.
    assert main(["launch", "slurm", "--multirun", *SWEPT, f"sweep.dir={sweep_dir}", "launch.dry_run=true"]) == 0
    assert "#SBATCH --array=1\n" in capsys.readouterr().out


def train_undisturbed(run_dir: str) -> None:
    """The same run without Slurm. Runs on every rank."""
    assert train(load([*TINY, f"train.max_steps={STEPS}", f"run.dir={run_dir}"])) == 0


def test_signal_before_the_limit_requeues_and_the_job_goes_on(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    for name, value in held(HELD_AT, tmp_path / "requeued").items():
        monkeypatch.setenv(name, value)  # Slurm hands the submitter's variables to the job
    job = launch(capsys, "launch.nodes=2", f"train.max_steps={STEPS}", f"run.dir={run_dir}")
    cluster.wait_for(lambda: len(steps_recorded(run_dir)) == HELD_AT - 1)  # a row comes when the next step is under way
    cluster.command("scancel", "--signal=USR1", job)  # what Slurm sends before the limit, to the same processes
    cluster.wait_for_state(job, "PENDING")
    assert read_summary(run_dir)["exit_reason"] == "signal"
    saved = len(steps_recorded(run_dir))
    assert saved in STOPS_AT
    (tmp_path / "requeued").touch()
    cluster.start_again_soon(job)
    told = cluster.wait_for_state(job, "COMPLETED", "FAILED")
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1")
    assert read_summary(run_dir)["resumed_from"] == [saved]
    assert steps_recorded(run_dir) == list(range(1, STEPS + 1))
    run_on_ranks(2, train_undisturbed, str(tmp_path / "undisturbed"))
    assert weights(run_dir, STEPS) == weights(tmp_path / "undisturbed", STEPS)
    logs = [file.name for file in (run_dir / "logs").glob("slurm-*")]
    assert sorted(logs) == [f"slurm-{job}.log", f"slurm-{job}.n0.t0.log", f"slurm-{job}.n1.t1.log"]


def test_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = cluster.command(
        "sbatch", "--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=100M",
        f"--chdir={tmp_path}", f"--export=ALL,PYTHON={sys.executable}", str(REPOSITORY / "launch/slurm/train.sbatch"),
        *TINY, "train.max_steps=100000", f"run.dir={run_dir}",
    )  # fmt: skip
    cluster.wait_for(lambda: len(steps_recorded(run_dir)) >= 2)
    cluster.command("scancel", job)
    told = cluster.wait_for_state(job, "CANCELLED")
    assert told["Restarts"] == "0"
    cluster.wait_for(
        lambda: read_summary(run_dir)["exit_reason"] == "signal" if (run_dir / "summary.json").exists() else False
    )
    assert (run_dir / "checkpoints" / f"step_{steps_recorded(run_dir)[-1]:08d}" / "manifest.json").exists()
    assert (tmp_path / f"slurm-{job}.n0.t1.log").exists()


def test_script_for_a_sweep_of_ones_own(cluster: Cluster, tmp_path: Path) -> None:
    lines = ["run.dir=first run.name='no blank'", "run.dir='the second' train.max_steps=3"]
    (tmp_path / "overrides.txt").write_text("".join(f"{line}\n" for line in lines))
    script = (REPOSITORY / "launch/slurm/sweep.sbatch").read_text()
    (tmp_path / "sweep.sbatch").write_text(script.replace("lisa_dist train", "lisa_dist train --cfg job"))
    job = cluster.command(
        "sbatch", "--parsable", "--array=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
        "--mem=100M", f"--chdir={tmp_path}", f"--export=ALL,PYTHON={sys.executable}", "sweep.sbatch", "overrides.txt",
    )  # fmt: skip
    assert cluster.wait_for_state(f"{job}_1", "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    shown = (tmp_path / f"slurm-{job}_1.n0.t0.log").read_text()
    assert "dir: the second\n" in shown and "max_steps: 3\n" in shown and "resume: auto\n" in shown


@pytest.mark.parametrize("image", ["torch.sif", "registry/torch:2"])
def test_containers(
    image: str, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for apptainer and pyxis that check what they are given; the rest is the real job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.sif").touch()
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("STAND_INS", str(STAND_INS))
    run_dir = tmp_path / "run"
    settings = ["launch.nodes=2", f"launch.container={image}", "launch.setup=['PATH=$STAND_INS:$PATH']"]
    job = launch(capsys, *settings, f"run.dir={run_dir}", "run.name='in a box'")
    log = run_dir / "logs" / f"slurm-{job}.n0.t0.log"
    assert cluster.wait_for_state(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log.read_text()
    shown = log.read_text()
    assert shown.startswith(f"in the container {image}\n")
    assert f"  dir: {run_dir}\n" in shown and "  name: in a box\n" in shown and "  resume: auto\n" in shown
    assert (run_dir / "logs" / f"slurm-{job}.n1.t1.log").read_text() == f"in the container {image}\n"
