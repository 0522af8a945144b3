"""What holds for all tests."""

from __future__ import annotations

import gc

gc.disable()  # collecting tests imports everything and leaves no garbage


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays until the end: modules, tests and their parameters."""
    gc.freeze()
    gc.enable()
