"""The job script of a configuration: what it says, and what reaches the program through the shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lisa_dist.cli import main
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.launching.slurm import Array, limit_seconds, run_script, sweep_script, tasks_per_node

AWKWARD = ["run.name=a b", "data.columns={prompt:q,completion:a}", "data.path='$HOME/`date`;#\"x\"'"]


def config(*overrides: str) -> Config:
    return load(["run.dir=/runs/one", *overrides])


def options(script: str) -> list[str]:
    """Return the options that sbatch reads in a script."""
    lines = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [shlex.split(line)[0] for line in lines]


def test_what_a_job_could_not_read_is_told_before_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    run_dir = tmp_path / "run"
    launch = ["launch", "slurm", "data.path=/nowhere.json", f"run.dir={run_dir}"]
    assert main(launch) == 2
    assert "data.path=/nowhere.json: " in capsys.readouterr().err and not run_dir.exists()
    for elsewhere in ("launch.dry_run=true", "launch.setup=['fetch it']", "launch.container=train.sif"):
        main([*launch, elsewhere])
        assert run_dir.exists() and "the job must find it where it runs" in capsys.readouterr().err


def test_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "launch.nodes=2", "launch.gpus_per_node=8", "launch.time=12:00:00", "launch.partition=gpu", "launch.account=us",
        "launch.options=['--mem=10G']", "launch.setup=['module load cuda','ulimit -n 4096']",
    ]  # fmt: skip
    script = run_script(config(*settings), ["train.max_steps=3"])
    assert options(script) == [
        "--job-name=one",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--time=12:00:00",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--chdir={tmp_path}",
        "--output=/runs/one/logs/slurm-%j.log",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=us",
        "--mem=10G",
    ]
    assert script.startswith("#!/bin/bash\n")
    assert "\nmodule load cuda\nulimit -n 4096\n" in script
    order = ["module load", "export MASTER_ADDR", "srun ", "code=$?", "scontrol requeue", "exit $code"]
    places = [script.index(part) for part in order]
    assert places == sorted(places)
    assert "trap" not in script.replace("There is no trap here", "")


def run_with_stand_ins(script: str, folder: Path, code: int = 0, **environment: str) -> tuple[int, list[list[str]]]:
    """Run a script with stand-ins for Slurm's commands; return its code and the words of each call."""
    calls = folder / "calls"
    for name, answer in {"srun": f"exit {code}", "scontrol": "echo n1 NodeAddr=10.0.0.1", "sleep": ""}.items():
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$@" >> {calls}; printf "\\n" >> {calls}\n{answer}\n')
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]"}
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", **job, **environment}
    result = subprocess.run(["bash"], input=script, text=True, env=variables, cwd=folder)
    lines = calls.read_text().split("\0\n")
    return result.returncode, [line.split("\0") for line in lines if line]


def test_overrides_reach_the_program_word_by_word(tmp_path: Path) -> None:
    code, calls = run_with_stand_ins(run_script(config("run.dir='/runs/a b%j'"), AWKWARD), tmp_path)
    (call,) = [call for call in calls if call[0] == "srun"]
    assert code == 0
    assert "--output=/runs/a b%%j/logs/slurm-%j.n%n.t%t.log" in call
    start = call.index(sys.executable)
    assert call[start:] == [
        sys.executable, "-m", "lisa_dist", "train", *AWKWARD, "checkpoint.resume=auto", "run.dir='/runs/a b%j'",
    ]  # fmt: skip
    assert not any("requeue" in call for call in calls)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_only_a_saved_stop_is_requeued(code: int, requeued: bool, tmp_path: Path) -> None:
    ended, calls = run_with_stand_ins(run_script(config(), []), tmp_path, code)
    assert ended == code
    assert (["scontrol", "requeue", "123456"] in calls) is requeued


def test_jobs_of_an_array(tmp_path: Path) -> None:
    (tmp_path / "jobs.txt").write_text(f"0_x run.name=x\n{shlex.join(['1_y', *AWKWARD])}\n")
    settings = load(["launch.tasks_per_node=2"])
    script = sweep_script(settings, Array(tmp_path, [0, 1], None)).replace(
        f"{sys.executable} -m lisa_dist report", "echo"
    )
    assert "--array=0,1" in options(script)
    numbers = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}
    code, calls = run_with_stand_ins(script, tmp_path, 75, **numbers)
    (call,) = [call for call in calls if call[0] == "srun"]
    assert code == 75
    assert call[-len(AWKWARD) - 1 :] == ["train", *AWKWARD]
    assert ["scontrol", "requeue", "7_1"] in calls
    assert (tmp_path / "1_y" / "exit_code").read_text() == "75\n"
    assert "--array=1%4" in options(sweep_script(settings, Array(tmp_path, [1], 4)))


def test_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = config("launch.container=/images/torch.sif", "launch.gpus_per_node=4")
    assert (
        f"apptainer exec --nv --bind {tmp_path},/runs/one /images/torch.sif python -m lisa_dist train"
    ) in run_script(image, [])
    monkeypatch.setenv("HOME", "/home/me")
    assert ",/runs/one /home/me/torch.sif python" in run_script(config("launch.container=~/torch.sif"), [])
    script = run_script(config("launch.container=registry/torch:2"), [])
    assert f"--container-image=registry/torch:2 --container-mounts={tmp_path}:{tmp_path},/runs/one:/runs/one" in script
    assert "    python -m lisa_dist train" in script


@pytest.mark.parametrize(
    ("settings", "tasks"),
    [
        ([], 1),
        (["parallel.nproc_per_node=4"], 4),
        (["launch.gpus_per_node=8"], 8),
        (["launch.gpus_per_node=8", "launch.tasks_per_node=2"], 2),
        (["launch.tasks_per_node=3"], 3),
    ],
)
def test_tasks_on_a_node(settings: list[str], tasks: int) -> None:
    assert tasks_per_node(config(*settings)) == tasks


def test_nodes_of_the_plan_are_those_of_the_job() -> None:
    assert "--nodes=3" in options(run_script(config("parallel.nodes=3"), []))
    assert "--nodes=1" in options(run_script(config("parallel.nodes=3", "launch.nodes=1"), []))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 90 * 60), ("10:30", 630), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200), ("1-0:0:5", 86405)],
)
def test_time_limits(time: str, seconds: int) -> None:
    assert limit_seconds(time) == seconds


def test_short_limit_leaves_time_to_train() -> None:
    assert "--signal=USR1@150" in options(run_script(config("launch.time=10"), []))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("launch.time=soon", "launch.time=soon: must be a time"),
        ("launch.options=[mem]", "launch.options: mem must be an option of sbatch"),
        ("launch.options=['--time=0:05:00']", "launch.options: --time=0:05:00 is set by launch.time"),
        ("launch.options=[-t10]", "launch.options: -t10 is set by launch.time"),
        ('launch.options=["--comment=a\nb"]', "must be one line"),
        ("launch.tasks_per_node=9", "launch.tasks_per_node=9: must be at most launch.gpus_per_node=8"),
    ],
)
def test_mistakes(setting: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        run_script(config("launch.gpus_per_node=8", setting), [])


def test_command_writes_and_shows_and_submits_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    arguments = ["launch", "slurm", "train.max_steps=3", f"run.dir={run_dir}", "launch.dry_run=true"]
    assert main(arguments) == 0
    script = (run_dir / "job.sbatch").read_text()
    shown = capsys.readouterr().out
    assert script in shown and f"sbatch {run_dir}/job.sbatch" in shown
    assert script.count("run.dir=") == 1 and "launch.dry_run" not in script
    assert main(arguments) == 0  # a script of ours is written again
    (run_dir / "job.sbatch").write_text("mine")
    assert main(arguments) == 2
    assert (run_dir / "job.sbatch").read_text() == "mine"


def test_no_slurm_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err


def test_slurm_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho error: no such partition >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["launch", "slurm", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "no such partition" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["launch.nodes=3", "launch.gpus_per_node=8"], "train.global_batch_size=32: must be a multiple"),
        (["launch.nodes=3", "parallel.replicate=2"], "parallel.replicate=2: must divide the number of ranks, 3"),
        (["launch.nodes=2", "parallel.offload=auto"], "parallel.offload=auto: needs one rank"),
    ],
)
def test_what_the_ranks_would_refuse_is_told_before_the_job_waits(
    settings: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = ["launch", "slurm", "launch.dry_run=true", "train.micro_batch_size=1", *settings]
    assert main([*launch, f"run.dir={tmp_path / 'run'}"]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*launch, f"run.dir={tmp_path / 'run'}", "launch.options=['--nodes=1','--ntasks-per-node=1']"]) == 0


def test_an_array_that_is_too_large_is_told_with_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "sbatch: error: Batch job submission failed: Invalid job array specification"
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["launch", "slurm", "--multirun", "train.seed=1,2", f"sweep.dir={tmp_path / 'sweep'}"]) == 2
    assert f"{said} (MaxArraySize, " in capsys.readouterr().err


def test_what_the_site_says_to_a_job_that_it_takes_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 'moved to partition slow' >&2\necho Welcome\necho '12;one'\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["launch", "slurm", f"run.dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr()
    assert "moved to partition slow\n" in shown.err and "submitted as job 12; to stop it: scancel 12" in shown.out
