"""In processes of their own, for logging is global. A rank is played by replacing the function that tells it."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys, warnings
from lisa_dist.telemetry import logs
logs.rank = lambda: int(sys.argv[1])
library = logging.getLogger("transformers")
library.addHandler(logging.StreamHandler())
library.propagate = False
logs.setup_logging()
logs.setup_logging(sys.argv[2])
logging.getLogger("lisa_dist.training.loop").info("hello")
library.warning("from a library")
library.info("chatter")
warnings.warn("careful")
print("to stdout")
"""


def run(rank: int, run_dir: Path, stderr=subprocess.PIPE):
    command = [sys.executable, "-c", PROGRAM, str(rank), str(run_dir)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True, timeout=120)


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_0_speaks_to_the_terminal_and_every_rank_to_its_file(tmp_path, rank):
    done = run(rank, tmp_path)
    logged = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
    for text in ("hello", "from a library", "careful"):
        assert logged.count(text) >= 1
        assert done.stderr.count(text) == (logged.count(text) if rank == 0 else 0)
    assert logged.count("hello") == logged.count("from a library") == 1
    assert "INFO lisa_dist.training.loop: hello" in logged
    assert "chatter" not in logged + done.stderr
    assert done.stdout == "to stdout\n"


def test_a_stderr_that_is_the_file_already_is_not_written_twice(tmp_path):
    (tmp_path / "logs").mkdir()
    with (tmp_path / "logs" / "rank_3.log").open("w") as file:
        run(3, tmp_path, stderr=file)
    logged = (tmp_path / "logs" / "rank_3.log").read_text()
    assert logged.count("hello") == 1 and logged.count("from a library") == 1
