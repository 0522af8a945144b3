"""Real processes: killed, stopped and signalled, and every time the run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from lisa_dist.config import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from lisa_dist.config.loading import load
from tests.support import dying
from tests.support.forkserver import FORKSERVER
from tests.support.processes import OVERRIDES, PATIENCE, Launched, last_step, send_output_to, wait_until
from tests.support.runs import assert_same_run, train
from tests.support.tiny import read_summary

RESUME = "checkpoint.resume=auto"
KILLS, SEED = 100, 7  # of the soak
# A start that is to be disturbed has no end of its own, or it could come first; the learning rate can't depend on it.
ENDLESS, CONSTANT = "train.max_steps=1000000", "scheduler=constant"


def train_undisturbed(run_dir: Path, *overrides: str) -> Path:
    """The same run on a pool of two ranks, in the directory of that name."""
    train(2, load([*OVERRIDES, f"run.dir={run_dir}", *overrides]))
    return run_dir


@pytest.mark.e2e
@pytest.mark.timeout(3000)
def test_kills_and_signals_in_a_row(tmp_path: Path) -> None:
    """One rank killed; the launcher killed; SIGUSR1 to one rank: then to the end."""
    common = (CONSTANT, "checkpoint.every=2")
    settings = (*common, "checkpoint.async=true", "checkpoint.full_every=3", RESUME)
    run_dir = tmp_path / "run"

    def start() -> Launched:
        """Start or go on, until a checkpoint of this start is there for the next one to go on from."""
        run = Launched(run_dir, *settings, ENDLESS)
        run.wait_for_checkpoint()
        return run

    run = start()
    os.kill(run.rank_process(1), signal.SIGKILL)
    code, output = run.finish()
    assert code == EXIT_FAILED and "rank 1 failed: it was killed" in output, output

    run = start()
    ranks = [run.rank_process(rank) for rank in (0, 1)]
    os.kill(run.pid, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    wait_until(lambda: not [process for process in ranks if is_running(process)], "the ranks to die with the launcher")

    run = start()
    os.kill(run.rank_process(1), signal.SIGUSR1)  # as Slurm may send it to one task
    code, output = run.finish()
    assert code == EXIT_STOPPED, output
    assert read_summary(run_dir)["exit_reason"] == "signal"

    end = f"train.max_steps={last_step(run_dir) + 3}"
    code, output = Launched(run_dir, *settings, end).finish()
    assert code == EXIT_DONE, output
    assert len(read_summary(run_dir)["resumed_from"]) == 3
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *common, end))


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and " Z " not in stat.read_text()


def run_by_torchrun(output: Path, *arguments: str) -> None:
    """Be torchrun with two ranks, one of which dies, and one restart."""
    send_output_to(output, output)
    settings = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    torchrun.main([*settings, "--start-method=fork", "--run-path", str(dying.__file__), "train", *arguments])


@pytest.mark.e2e
@pytest.mark.timeout(3000)
def test_torchrun_brings_a_run_back_by_itself(tmp_path: Path) -> None:
    """Rank 1 is killed before step 4, two steps after a checkpoint."""
    settings = ("train.max_steps=6", "checkpoint.every=2")
    run_dir, output = tmp_path / "run", tmp_path / "output"
    run = FORKSERVER.Process(target=run_by_torchrun, args=(output, *OVERRIDES, f"run.dir={run_dir}", *settings))
    run.start()
    run.join(PATIENCE)
    assert run.exitcode == EXIT_DONE, output.read_text()
    assert read_summary(run_dir)["resumed_from"] == [2]
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *settings))


@pytest.mark.e2e
@pytest.mark.timeout(3000)
def test_a_rank_that_stands_still_is_named(tmp_path: Path) -> None:
    run = Launched(tmp_path / "run", ENDLESS, "parallel.timeout=15")
    stopped = run.rank_process(1)
    run.wait_for_step(3)
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: run.outcome_is_known(0), "the end of rank 0")
    with contextlib.suppress(ProcessLookupError):  # torch kills it after half a minute
        os.kill(stopped, signal.SIGCONT)
    code, output = run.finish()
    assert code == EXIT_FAILED
    reason = read_summary(tmp_path / "run")["exit_reason"]
    assert reason.startswith("failed: LostRankError: rank 0 waited in "), reason
    assert "rank 1 on " in reason and "stands still, last seen" in reason and " of step " in reason
    assert "no progress for" in output, "the watcher speaks before the collective's time-out"


@pytest.mark.soak
def test_a_hundred_random_kills(tmp_path: Path) -> None:
    """Kill one rank, all ranks or the launcher: at random steps, and every fifth time while the run comes up."""
    common = (CONSTANT, "checkpoint.every=5")
    settings = (*common, "checkpoint.async=true", "checkpoint.full_every=3", RESUME)
    run_dir, draws, counts = tmp_path / "run", random.Random(SEED), {"rank": 0, "all": 0, "launcher": 0}
    for number in range(KILLS):
        begun, done = time.monotonic(), last_step(run_dir)
        run = Launched(run_dir, *settings, ENDLESS)
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
    end = f"train.max_steps={last_step(run_dir) + 3}"
    code, output = Launched(run_dir, *settings, end).finish()
    assert code == EXIT_DONE, output
    print(f"kills: {counts}, resumed {len(read_summary(run_dir)['resumed_from'])} times")
    assert_same_run(run_dir, train_undisturbed(tmp_path / "reference", *common, end))
