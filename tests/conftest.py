"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest

gc.disable()  # collecting tests imports everything and leaves no garbage

# Folders whose tests wait for other processes most of their time: first, so that others compute meanwhile.
WAITING = ("slurm", "network", "faults", "launching")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that wait most before all others, which stay in their order."""
    tests = config.rootpath / "tests"
    places = {name: place for place, name in enumerate(WAITING)}
    items.sort(key=lambda item: places.get(item.path.relative_to(tests).parts[0], len(WAITING)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays until the end: modules, tests and their parameters."""
    gc.freeze()
    gc.enable()
