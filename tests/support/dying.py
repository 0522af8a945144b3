"""The command line, in whose first start rank 1 is killed before its fourth step; a script for torchrun."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from lisa_dist.cli import main
from lisa_dist.runtime.environment import restart_count
from lisa_dist.training import loop

LAST_STEP = 3  # that rank 1 makes


def die_after_the_last_step() -> None:
    train_step = loop.train_step

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        if number == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(train_module, micro_batches, number, *rest, **more)

    loop.train_step = step


if __name__ == "__main__":
    if os.environ["RANK"] == "1" and restart_count() == 0:
        die_after_the_last_step()
    if code := main():  # torchrun waits for a forked rank that leaves with 0 by sys.exit
        sys.exit(code)
