"""What a host runs in the tests of the network: the trainer, step by step as allowed, and a count of the bytes sent."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lisa_dist.config.loading import load
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.signals import install_stop_handlers
from lisa_dist.training import loop
from tests.support.processes import send_output_to

NETWORK = 0x40000000  # setns's CLONE_NEWNET


def move_to(host: str) -> None:
    """Move this process, which has one thread, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", host).open() as namespace:
        if libc.setns(namespace.fileno(), NETWORK):
            raise OSError(ctypes.get_errno(), f"{host} can't be entered")


def bytes_sent() -> int:
    """Return the bytes that have left this host."""
    devices = [line.split() for line in Path("/proc/self/net/dev").read_text().splitlines()]
    return sum(int(device[9]) for device in devices if device[0].startswith("v"))


def run_rank(
    host: str, settings: dict[str, str], log: Path, counts_of_bytes: Path, allowed: Path, overrides: list[str]
) -> None:
    """Be a rank on ``host``: train, and write a number for each step into ``counts_of_bytes``.

    Before a step past those whose number ``allowed`` holds the rank waits.
    """
    move_to(host)
    send_output_to(log, log)
    os.environ.update(settings)
    install_stop_handlers()
    counts: list[int] = []
    train_step = loop.train_step

    def counted(train_module: Any, micro_batches: Any, step: int, *rest: Any, **more: Any) -> Any:
        while step >= int(allowed.read_text()):
            time.sleep(0.02)
        before = bytes_sent()
        result = train_step(train_module, micro_batches, step, *rest, **more)
        counts.append(bytes_sent() - before)
        write_atomically(counts_of_bytes, json.dumps(counts))
        return result

    loop.train_step = counted
    sys.exit(loop.train(load(overrides)))
