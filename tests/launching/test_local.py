"""The launcher of local ranks: exit codes, logs, the first failure, signals, and no orphans. Real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lisa_dist.config import Config, ParallelConfig, UserError
from lisa_dist.launching.local import Entry, count_local_ranks, launch_ranks
from lisa_dist.launching.rank_server import start_rank_server
from tests.support import programs
from tests.support.forkserver import FORKSERVER
from tests.support.launcher import Launcher, local_ranks
from tests.support.processes import PATIENCE, send_output_to
from tests.support.tiny import read_summary


@contextmanager
def typed(text: str) -> Iterator[None]:
    """Let this process find ``text`` on its stdin."""
    reads, writes = os.pipe()
    os.write(writes, text.encode())
    os.close(writes)
    own = os.dup(0)
    os.dup2(reads, 0)
    try:
        yield
    finally:
        os.dup2(own, 0)
        os.close(own)
        os.close(reads)


def launch_and_look(config: Config, stdout: Path, stderr: Path) -> None:
    """Be a launcher whose ranks end well, of which nothing is left in its process."""
    send_output_to(stdout, stderr)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT)
    handlers, environment = [signal.getsignal(number) for number in numbers], dict(os.environ)
    start_rank_server()
    with typed("what is typed\n"):
        assert launch_ranks(config, programs.finish) == 0
    assert handlers == [signal.getsignal(number) for number in numbers]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert os.environ == environment


def test_all_done(tmp_path: Path) -> None:
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    process = FORKSERVER.Process(target=launch_and_look, args=(local_ranks(tmp_path, "mine"), stdout, stderr))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, stderr.read_text()
    said = ["rank 0 of 2 with run.name=mine", "rank 0 natively", "rank 0 reads 'what is typed\\n'"]
    assert stdout.read_text().splitlines() == said
    assert "rank 0 on stderr" in stderr.read_text() and "rank 1" not in stderr.read_text()
    assert sorted((tmp_path / "logs" / "rank_1.log").read_text().splitlines()) == [
        "rank 1 natively",
        "rank 1 of 2 with run.name=mine",
        "rank 1 on stderr",
    ]
    assert not (tmp_path / "summary.json").exists()  # a run that ends well writes its own


def test_ranks_that_are_no_grid_are_refused_before_they_start(tmp_path: Path) -> None:
    config = local_ranks(tmp_path / "run")
    config.parallel.replicate = 3
    with pytest.raises(UserError, match=r"parallel\.replicate=3: must divide the number of ranks, 2"):
        launch_ranks(config, programs.finish)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start a launcher of an entry."""
    (tmp_path / "run").mkdir()
    started: list[Launcher] = []

    def launch(
        entry: Entry, *, seconds_to_save: float = 0, ranks: int = 2, forked: bool = True, saves: bool = True
    ) -> Launcher:
        config = local_ranks(tmp_path / "run", str(seconds_to_save), ranks)
        started.append(Launcher(config, entry, forked=forked, saves=saves))
        return started[-1]

    yield launch
    for launcher in started:
        launcher.close()


def test_first_failure_alone_is_shown(launch: Callable[..., Launcher]) -> None:
    launcher = launch(programs.fail)
    code, shown = launcher.finish()
    assert code == 1
    assert shown.count("Traceback") == 1 and 'raise ValueError("the first failure")' in shown
    assert "rank 1 failed: ValueError: the first failure" in shown and "rank_1.log" in shown
    assert "a connection was lost" not in shown
    assert "a connection was lost" in (launcher.run_dir / "logs" / "rank_0.log").read_text()
    assert "the first failure" in (launcher.run_dir / "logs" / "rank_1.log").read_text()
    # Rank 0 has summed up with a reason of its own, which only follows from the first.
    assert read_summary(launcher.run_dir) == {
        "exit_reason": "failed: ValueError: the first failure",
        "resumed_from": [3],
    }


def test_killed_rank_is_the_first_failure(launch: Callable[..., Launcher]) -> None:
    launcher = launch(programs.die)
    code, shown = launcher.finish()
    assert code == 1 and "rank 1 failed: it was killed by SIGKILL" in shown
    if not torch.cuda.is_available():
        assert "when memory runs out; what needs less, in the order to try it: " in shown
        assert f"lisa-dist plan run.dir={launcher.run_dir} parallel.nproc_per_node=2; its log is" in shown
    assert "a connection was lost" not in shown


def test_memory_that_runs_out_is_told_in_a_sentence(launch: Callable[..., Launcher]) -> None:
    launcher = launch(programs.run_out_of_memory, ranks=1)
    log = launcher.run_dir / "logs" / "rank_0.log"
    code, shown = launcher.finish()
    assert code == 1
    assert shown.splitlines()[-1].startswith("lisa-dist: rank 0 failed: out of memory in forward of step 3, ")
    assert shown.endswith(f"its log is {log}\n") and "Traceback" not in shown
    assert log.read_text().count("Traceback") == 1 and "MemoryError: all of it" in log.read_text()
    assert read_summary(launcher.run_dir)["exit_reason"].startswith("failed: out of memory in forward of step 3, ")


def test_mistake_of_the_user_is_raised_once(launch: Callable[..., Launcher], tmp_path: Path) -> None:
    (tmp_path / "run" / "summary.json").write_text('{"exit_reason": "finished"}')
    launcher = launch(programs.mistake)
    assert launcher.finish() == (2, "data.path=nowhere: must be a file\n")
    assert read_summary(launcher.run_dir)["exit_reason"] == "finished"  # a mistake writes over nothing


def test_what_the_system_refuses_a_rank_is_a_mistake(launch: Callable[..., Launcher]) -> None:
    launcher = launch(programs.be_refused)
    told = "/closed/model.safetensors: Permission denied; name a path that this account may use"
    assert launcher.finish() == (2, f"{told}\n")
    assert "Traceback" in (launcher.run_dir / "logs" / "rank_0.log").read_text()


def test_ranks_that_disagree_have_failed(launch: Callable[..., Launcher]) -> None:
    code, shown = launch(programs.disagree).finish()
    assert code == 1 and "rank 1 failed: it ended with code 75" in shown


def test_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir=.*can't be written"):
        launch_ranks(local_ranks(tmp_path / "file"), programs.finish)


@pytest.mark.parametrize(("gpus", "wanted", "ranks"), [(0, "auto", 1), (4, "auto", 4), (0, "3", 3), (4, "2", 2)])
def test_number_of_ranks(gpus: int, wanted: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert count_local_ranks(ParallelConfig(nproc_per_node=wanted)) == ranks


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"parallel\.nproc_per_node=3: must be at most 2"):
        count_local_ranks(ParallelConfig(nproc_per_node="3"))


def gone(process: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def all_gone(processes: list[int]) -> bool:
    """Whether all end."""
    deadline = time.monotonic() + PATIENCE
    while not all(gone(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_control_c_saves_and_stops(launch: Callable[..., Launcher]) -> None:
    quick = launch(programs.train_until_stopped, seconds_to_save=0.3)
    ranks = quick.ranks()
    assert quick.wait_for("training_0_*")[0].read_text() == "terminal: True"
    assert quick.wait_for("training_1_*")[0].read_text() == "terminal: False"
    quick.press_control_c()
    code, shown = quick.finish()
    assert code == 75
    assert (quick.run_dir / "saved_0").exists() and (quick.run_dir / "saved_1").exists()
    assert shown.count("saves a checkpoint") == 1 and "Traceback" not in shown
    assert all_gone(ranks)


def test_term_to_the_launcher_saves_and_stops(launch: Callable[..., Launcher]) -> None:
    quick = launch(programs.train_until_stopped, seconds_to_save=0.1)
    ranks = quick.ranks()
    quick.send(signal.SIGTERM)
    assert quick.finish()[0] == 75
    assert (quick.run_dir / "saved_0").exists() and (quick.run_dir / "saved_1").exists()
    assert all_gone(ranks)


@pytest.mark.e2e
def test_signal_while_the_ranks_start_is_not_lost(launch: Callable[..., Launcher]) -> None:
    quick = launch(programs.train_until_stopped, ranks=1, forked=False)
    quick.wait_for("logs")  # the launcher listens; its rank has not even imported torch
    quick.send(signal.SIGUSR1)
    assert quick.finish()[0] == 75
    assert (quick.run_dir / "saved_0").exists()


def test_control_c_twice_kills(launch: Callable[..., Launcher]) -> None:
    slow = launch(programs.train_until_stopped, seconds_to_save=600, ranks=1)
    ranks = slow.ranks()
    slow.press_control_c()
    slow.wait_for("saving_0")
    slow.press_control_c()
    code, shown = slow.finish()
    assert code == 1
    assert "the ranks are killed" in shown and "it was killed by SIGKILL, as asked" in shown
    assert "memory" not in shown
    assert not (slow.run_dir / "saved_0").exists()
    assert all_gone(ranks)


def test_control_c_once_ends_what_saves_nothing(launch: Callable[..., Launcher]) -> None:
    slow = launch(programs.train_until_stopped, seconds_to_save=600, saves=False)
    ranks = slow.ranks()
    slow.press_control_c()
    code, shown = slow.finish()
    assert code == 130 and shown == "KeyboardInterrupt\n"
    assert all_gone(ranks)


@pytest.mark.e2e
def test_no_rank_outlives_a_killed_launcher(launch: Callable[..., Launcher]) -> None:
    slow = launch(programs.train_until_stopped, seconds_to_save=600, ranks=1, forked=False)
    ranks = slow.ranks()
    assert not any(gone(rank) for rank in ranks)
    slow.send(signal.SIGKILL)
    slow.finish()
    assert all_gone(ranks)
