"""In processes of their own, for logging is global. A rank is played by replacing the function that tells it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import pytest

from lisa_dist.telemetry import logs
from tests.support.forkserver import FORKSERVER
from tests.support.processes import PATIENCE, send_output_to


def log(rank: int, run_dir: Path, stdout: Path, stderr: Path) -> None:
    """Be a rank that logs, prints and warns, as do the libraries that it has imported."""
    send_output_to(stdout, stderr)
    logs.rank = lambda: rank
    library = logging.getLogger("transformers")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    logs.setup_logging()
    logs.setup_logging(run_dir)
    logging.getLogger("lisa_dist.training.loop").info("hello")
    library.warning("from a library")
    library.info("chatter")
    warnings.warn("careful", stacklevel=1)
    print("to stdout")
    sys.stdout.flush()


def run(rank: int, run_dir: Path, stderr: Path) -> tuple[str, str]:
    """What such a rank prints, and its log."""
    stdout = run_dir / "stdout"
    process = FORKSERVER.Process(target=log, args=(rank, run_dir, stdout, stderr))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0, stderr.read_text()
    return stdout.read_text(), (run_dir / "logs" / f"rank_{rank}.log").read_text()


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_0_speaks_to_the_terminal_and_every_rank_to_its_file(tmp_path: Path, rank: int) -> None:
    stdout, logged = run(rank, tmp_path, tmp_path / "stderr")
    terminal = (tmp_path / "stderr").read_text()
    for text in ("hello", "from a library", "careful"):
        assert logged.count(text) >= 1
        assert terminal.count(text) == (logged.count(text) if rank == 0 else 0)
    assert logged.count("hello") == logged.count("from a library") == 1
    assert "INFO lisa_dist.training.loop: hello" in logged
    assert "chatter" not in logged + terminal
    assert stdout == "to stdout\n"


def test_a_stderr_that_is_the_file_already_is_not_written_twice(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    _, logged = run(3, tmp_path, tmp_path / "logs" / "rank_3.log")
    assert logged.count("hello") == 1 and logged.count("from a library") == 1
