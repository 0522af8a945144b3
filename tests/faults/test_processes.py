"""Real processes: killed, stopped and signalled, and every time the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from lisa_dist.config.loading import load
from lisa_dist.telemetry.records import read_rows, read_summary
from tests.checkpoint.runs import assert_same_run, train
from tests.faults.processes import OVERRIDES, PATIENCE, Launched, wait_until

RESUME = "checkpoint.resume=auto"
KILLS, SEED = 100, 7  # of the soak; the seed also of the other kills


def train_undisturbed(run_dir: Path, *overrides: str) -> Path:
    """The same run on a pool of two ranks, in the directory of that name."""
    train(2, load([*OVERRIDES, f"run.dir={run_dir}", *overrides]))
    return run_dir


@pytest.mark.timeout(600)
def test_kills_and_signals_in_a_row(tmp_path: Path) -> None:
    """One rank killed; all killed; the launcher killed; SIGTERM; SIGUSR1 to one rank: then to the end."""
    undisturbed = ("train.max_steps=18", "checkpoint.every=2")
    settings = (*undisturbed, "checkpoint.async=true", "checkpoint.full_every=3", RESUME)
    run_dir, draws = tmp_path / "run", random.Random(SEED)
    steps = [3 * number + draws.randrange(3) for number in range(1, 6)]

    run = Launched(run_dir, *settings)
    run.wait_for_step(steps[0])
    os.kill(run.rank_process(draws.randrange(2)), signal.SIGKILL)
    code, output = run.finish()
    assert code == EXIT_FAILED and "failed: it was killed by SIGKILL" in output

    run = Launched(run_dir, *settings)
    run.wait_for_step(steps[1])
    for rank in (0, 1):
        os.kill(run.rank_process(rank), signal.SIGKILL)
    assert run.finish()[0] == EXIT_FAILED

    run = Launched(run_dir, *settings)
    ranks = [run.rank_process(rank) for rank in (0, 1)]
    run.wait_for_step(steps[2])
    os.kill(run.pid, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    wait_until(lambda: not [process for process in ranks if is_running(process)], "the ranks to die with the launcher")

    run = Launched(run_dir, *settings)
    run.wait_for_step(steps[3])
    os.kill(run.pid, signal.SIGTERM)
    code, output = run.finish()
    assert code == EXIT_STOPPED, output
    assert read_summary(run_dir)["exit_reason"] == "signal"

    run = Launched(run_dir, *settings)
    run.wait_for_step(steps[4])
    os.kill(run.rank_process(1), signal.SIGUSR1)  # as Slurm may send it to one task
    assert run.finish()[0] == EXIT_STOPPED

    code, output = Launched(run_dir, *settings).finish()
    assert code == EXIT_DONE, output
    assert len(read_summary(run_dir)["resumed_from"]) == 5
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *undisturbed))


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and " Z " not in stat.read_text()


@pytest.mark.timeout(600)
def test_torchrun_brings_a_run_back_by_itself(tmp_path: Path) -> None:
    settings = ("train.max_steps=6", "checkpoint.every=2")
    run_dir = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [*torchrun, "--max-restarts=1", "--monitor-interval=0.1", "-m", "lisa_dist", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("w") as output:
        run = subprocess.Popen(
            [*program, *OVERRIDES, f"run.dir={run_dir}", *settings], stdout=output, stderr=output, env=environment
        )
    wait_until(lambda: (run_dir / "checkpoints" / checkpoint_name(2)).exists(), "a checkpoint")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = [child for child in children if b"lisa_dist" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(int(ranks[0]), signal.SIGKILL)
    assert run.wait(PATIENCE) == EXIT_DONE, (tmp_path / "output").read_text()
    assert len(read_summary(run_dir)["resumed_from"]) == 1
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *settings))


@pytest.mark.timeout(600)
def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", "train.max_steps=100000", "parallel.timeout=10")
    stopped = run.rank_process(1)
    run.wait_for_step(3)
    os.kill(stopped, signal.SIGSTOP)
    wait_until((tmp_path / "run" / "summary.json").exists, "the end of rank 0")
    os.kill(stopped, signal.SIGCONT)  # torch gives it half a minute to end
    code, output = run.finish()
    assert code == EXIT_FAILED
    reason = read_summary(tmp_path / "run")["exit_reason"]
    assert reason.startswith("failed: LostRankError: rank 0 waited in "), reason
    assert "rank 1 on " in reason and "stands still, last seen" in reason and " of step " in reason
    assert "no progress for" in output, "the watcher speaks before the collective's time-out"


@pytest.mark.soak
def test_a_hundred_random_kills(tmp_path: Path) -> None:
    """Kill one rank, all ranks or the launcher: at random steps, and every fifth time while the run comes up."""
    undisturbed = ("train.max_steps=700", "checkpoint.every=5")
    settings = (*undisturbed, "checkpoint.async=true", "checkpoint.full_every=3", RESUME)
    run_dir, draws, counts = tmp_path / "run", random.Random(SEED), {"rank": 0, "all": 0, "launcher": 0}
    for number in range(KILLS):
        begun, done = time.monotonic(), max((row["step"] for row in read_rows(run_dir / "metrics.jsonl")), default=0)
        run = Launched(run_dir, *settings)
        ranks = [run.rank_process(rank) for rank in (0, 1)]
        if number % 5:
            run.wait_for_step(done + draws.randrange(1, 9))
            time.sleep(draws.uniform(0, 0.1))
        else:
            time.sleep(draws.uniform(0, 3))
        target = draws.choice(list(counts))
        counts[target] += 1
        for process in {"rank": [draws.choice(ranks)], "all": ranks, "launcher": [run.pid]}[target]:
            os.kill(process, signal.SIGKILL)
        run.finish()
        after = "on its way up" if number % 5 == 0 else f"past step {done}"
        print(f"kill {number + 1}: {target}, {after}, after {time.monotonic() - begun:.1f} s", flush=True)
    code, output = Launched(run_dir, *settings).finish()
    assert code == EXIT_DONE, output
    print(f"kills: {counts}, resumed {len(read_summary(run_dir)['resumed_from'])} times")
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *undisturbed))
