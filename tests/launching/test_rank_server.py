"""Ranks are forked from a process that has touched no GPU, whatever the packages do that a run imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import OVERRIDES, last_step

# A package that asks the GPU something when it is imported: a forked process can't use that GPU any more.
TOUCHES_A_GPU = """
import os, sys
from lisa_dist.launching import rank_server

rank_server.may_have_gpu = lambda: True

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "transformers":
            os.register_at_fork(after_in_child=lambda: os._exit(1))

sys.meta_path.insert(0, Watch)
"""


@pytest.mark.e2e
def test_ranks_train_where_a_package_touches_a_gpu_when_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TOUCHES_A_GPU)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    overrides = [*OVERRIDES, "parallel.nproc_per_node=1", "train.max_steps=2", f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-m", "lisa_dist", "train", *overrides],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert last_step(tmp_path / "run") == 2
