"""Processes that start at once: forked from one server, which has imported what a run needs.

Importing takes 6 s of computing, more than most tests. Those of torchrun_node.sh, of sweeps and of Slurm start
theirs as a user does.
"""

from __future__ import annotations

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["__main__", "tests.support.preloaded"])
