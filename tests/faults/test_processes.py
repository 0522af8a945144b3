"""Real processes: killed, stopped and signalled, and every time the run goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path

import pytest

from lisa_dist.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from lisa_dist.config.loading import load
from lisa_dist.telemetry.records import read_rows, read_summary
from tests.checkpoint.runs import assert_same_run, train
from tests.faults.processes import OVERRIDES, Launched

RESUME = "checkpoint.resume=auto"


def train_undisturbed(run_dir: Path, *overrides: str) -> Path:
    """The same run on a pool of two ranks, in the directory of that name."""
    train(2, load([*OVERRIDES, f"run.dir={run_dir}", *overrides]))
    return run_dir


@pytest.mark.timeout(600)
def test_kills_and_signals_in_a_row(tmp_path: Path) -> None:
    """One rank killed; all killed; the launcher killed; SIGTERM; SIGUSR1 to one rank: then to the end."""
    undisturbed = ("train.max_steps=36", "checkpoint.every=3")
    settings = (*undisturbed, "checkpoint.async=true", "checkpoint.full_every=3")
    run_dir = tmp_path / "run"

    run = Launched(run_dir, *settings)
    run.wait_for_step(5)
    run.kill(run.rank_process(1))
    code, output = run.finish()
    assert code == EXIT_FAILED and "rank 1 failed: it was killed by SIGKILL" in output

    run = Launched(run_dir, *settings, RESUME)
    run.wait_for_step(10)
    for rank in (0, 1):
        run.kill(run.rank_process(rank))
    assert run.finish()[0] == EXIT_FAILED

    run = Launched(run_dir, *settings, RESUME)
    ranks = [run.rank_process(rank) for rank in (0, 1)]
    run.wait_for_step(16)
    run.kill(run.process.pid)
    assert run.finish()[0] == -signal.SIGKILL
    assert not [process for process in ranks if Path(f"/proc/{process}").exists() and not is_zombie(process)]

    run = Launched(run_dir, *settings, RESUME)
    run.wait_for_step(20)
    run.kill(run.process.pid, signal.SIGTERM)
    code, output = run.finish()
    assert code == EXIT_STOPPED, output
    assert read_summary(run_dir)["exit_reason"] == "signal"

    run = Launched(run_dir, *settings, RESUME)
    run.wait_for_step(25)
    run.kill(run.rank_process(1), signal.SIGUSR1)  # as Slurm may send it to one task
    assert run.finish()[0] == EXIT_STOPPED

    code, output = Launched(run_dir, *settings, RESUME).finish()
    assert code == EXIT_DONE, output
    assert len(read_summary(run_dir)["resumed_from"]) == 5
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *undisturbed))


def is_zombie(process: int) -> bool:
    return " Z " in Path(f"/proc/{process}/stat").read_text()


@pytest.mark.timeout(600)
def test_torchrun_brings_a_run_back_by_itself(tmp_path: Path) -> None:
    settings = ("train.max_steps=12", "checkpoint.every=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = Launched(
        tmp_path / "run",
        *settings,
        program=[*torchrun, "--max-restarts=1", "--monitor-interval=0.1", "-m", "lisa_dist"],
    )
    run.wait_for_step(5)
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    ranks = [child for child in children if b"lisa_dist" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    run.kill(int(ranks[0]))
    code, output = run.finish()
    assert code == EXIT_DONE, output
    assert len(read_summary(tmp_path / "run")["resumed_from"]) == 1
    assert_same_run(tmp_path / "run", train_undisturbed(tmp_path / "reference", *settings))


@pytest.mark.timeout(600)
def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    timeout = 15
    run = Launched(tmp_path / "run", "train.max_steps=100000", f"parallel.timeout={timeout}")
    stopped = run.rank_process(1)
    run.wait_for_step(3)
    run.kill(stopped, signal.SIGSTOP)
    begun = time.monotonic()
    log = tmp_path / "run" / "summary.json"
    while not log.exists() and time.monotonic() - begun < 6 * timeout:
        time.sleep(0.1)
    run.kill(stopped, signal.SIGCONT)  # torch gives it half a minute to end
    code, output = run.finish()
    assert code == EXIT_FAILED
    reason = read_summary(tmp_path / "run")["exit_reason"]
    assert reason.startswith("failed: LostRankError: rank 0 waited in "), reason
    assert "rank 1 on " in reason and "stands still, last seen" in reason and " of step " in reason
    assert "no progress for" in output, "the watcher speaks before the collective's time-out"


KILLS, SEED = 100, 7


@pytest.mark.soak
def test_a_hundred_random_kills(tmp_path: Path) -> None:
    """Kill one rank, all ranks or the launcher: at random steps, and every fifth time while the run comes up."""
    undisturbed = ("train.max_steps=700", "checkpoint.every=5")
    settings = (*undisturbed, "checkpoint.async=true", "checkpoint.full_every=3", RESUME)
    run_dir, draws, counts = tmp_path / "run", random.Random(SEED), {"rank": 0, "all": 0, "launcher": 0}
    for number in range(KILLS):
        run = Launched(run_dir, *settings)
        ranks = [run.rank_process(rank) for rank in (0, 1)]
        if number % 5:
            rows = [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]
            run.wait_for_step(max(rows, default=0) + draws.randrange(1, 9))
            time.sleep(draws.uniform(0, 0.3))
        else:
            time.sleep(draws.uniform(0, 10))
        target = draws.choice(list(counts))
        counts[target] += 1
        victims = {"rank": [draws.choice(ranks)], "all": ranks, "launcher": [run.process.pid]}[target]
        for process in victims:
            run.kill(process)
        run.finish()
        print(f"kill {number + 1}: {target}, at step {max(rows, default=0) if number % 5 else 'start-up'}", flush=True)
    code, output = Launched(run_dir, *settings).finish(patience=1200)
    assert code == EXIT_DONE, output
    print(f"kills: {counts}, resumed {len(read_summary(run_dir)['resumed_from'])} times")
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *undisturbed))
