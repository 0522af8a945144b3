"""Processes that start at once: forked from one server, which has imported what a run needs.

Importing takes 6 s of computing, more than most tests. Those of torchrun_node.sh, of sweeps and of Slurm start
theirs as a user does.
"""

from __future__ import annotations

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
# As the process that ranks are forked from does: end with who started it, and collect no garbage while importing.
FORKSERVER.set_forkserver_preload(["lisa_dist.launching.ends_with_launcher", "__main__", "tests.support.preloaded"])
