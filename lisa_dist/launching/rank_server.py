"""The process that ranks are forked from: it imports torch, once, while the launcher does."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

from lisa_dist.runtime.signals import STOP_SIGNALS

# Imported by name in the server. None may start a thread or touch a GPU, which a forked process could not go on with;
# torch alone promises that. Others do, or don't, as their next version likes: transformers imports torchao where it is
# installed, which asks the GPU what it can. Ranks import the rest.
PRELOADED = ["lisa_dist.launching.ends_with_launcher", "torch.distributed.launcher.api"]


def start_rank_server() -> None:
    """Start the server, which ends with this process; ranks that are started before it is ready wait for it."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # multiprocessing's helper process: its start would lift the mask
    # Ranks inherit the mask and lift it when their handlers stand, so that no signal to all processes is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
