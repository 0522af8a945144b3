"""Processes that start at once: forked from one server, which has imported what a run needs.

Importing takes 6 s of computing, more than most tests. test_local.py and test_torchrun.py start theirs as a user does.
"""

from __future__ import annotations

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "__main__",
        "lisa_dist.cli",
        "lisa_dist.launching.local",
        "lisa_dist.training.loop",
        "transformers.models.llama.modeling_llama",
    ]
)
