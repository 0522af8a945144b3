"""What a host runs in the tests of the network: the trainer, and a count of the bytes that each step sends.

``python -m tests.support.network_program FILE [overrides]`` writes into FILE a list with a number for each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lisa_dist.config.loading import load
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.signals import install_stop_handlers
from lisa_dist.training import loop


def bytes_sent() -> int:
    """Return the bytes that have left this host."""
    devices = [folder for folder in Path("/sys/class/net").iterdir() if folder.name.startswith("v")]
    return sum(int((device / "statistics" / "tx_bytes").read_text()) for device in devices)


def main() -> int:
    file, *overrides = sys.argv[1:]
    install_stop_handlers()
    counts: list[int] = []
    train_step = loop.train_step

    def counted(*arguments: Any, **more: Any) -> Any:
        before = bytes_sent()
        result = train_step(*arguments, **more)
        counts.append(bytes_sent() - before)
        write_atomically(Path(file), json.dumps(counts))
        return result

    loop.train_step = counted
    return loop.train(load(overrides))


if __name__ == "__main__":
    sys.exit(main())
