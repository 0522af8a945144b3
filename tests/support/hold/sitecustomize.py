"""Holds the ranks of a run at a step, so that a test may take its time until it does something to the run.

Python imports this at its start where ``PYTHONPATH`` leads here; see ``held`` in tests/support/tiny.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINER = "lisa_dist.training.loop"


def hold(trainer: ModuleType) -> None:
    """Let each step from the given one on wait until its rank is asked to stop or the file is there."""
    first, _, file = os.environ["LISA_DIST_HOLD"].partition(":")
    train_step = trainer.train_step

    def held(train_module: Any, micro_batches: Any, step: int, *rest: Any, **more: Any) -> Any:
        while step >= int(first) and not trainer.stop_requested() and not Path(file).exists():
            time.sleep(0.02)
        return train_step(train_module, micro_batches, step, *rest, **more)

    trainer.train_step = held  # type: ignore[attr-defined]


class HoldFinder(MetaPathFinder):
    """Finds the trainer as others do, and changes it as soon as it is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hold(module: ModuleType) -> None:
            execute(module)
            hold(module)

        spec.loader.exec_module = execute_and_hold  # type: ignore[method-assign]
        return spec


if "LISA_DIST_HOLD" in os.environ:
    sys.meta_path.insert(0, HoldFinder())
