"""The process that ranks are forked from: it imports what all of them need, once, while the launcher imports torch."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

from lisa_dist.runtime.signals import STOP_SIGNALS

# Imported by name in the server. None may start a thread or touch a GPU, which a forked process could not go on with.
# Beside a GPU torch alone promises that: transformers imports torchao where it is installed, which asks the GPU what
# it can, and so may the next version of any package.
PRELOADED = ["lisa_dist.launching.ends_with_launcher", "torch.distributed.launcher.api"]
PRELOADED_WITHOUT_GPU = [*PRELOADED, "lisa_dist.launching.local", "lisa_dist.training.loop"]


def may_have_gpu() -> bool:
    """Whether this machine has the files of an NVIDIA or AMD driver."""
    return any(Path("/dev").glob("nvidia*")) or Path("/dev/kfd").exists()


def start_rank_server() -> None:
    """Start the server, which ends with this process; ranks that are started before it is ready wait for it."""
    multiprocessing.set_forkserver_preload(PRELOADED if may_have_gpu() else PRELOADED_WITHOUT_GPU)
    resource_tracker.ensure_running()  # multiprocessing's helper process: its start would lift the mask
    # Ranks inherit the mask and lift it when their handlers stand, so that no signal to all processes is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
