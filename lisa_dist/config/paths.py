"""Paths as a user writes them."""

from __future__ import annotations

from pathlib import Path


def local_path(text: str) -> Path:
    """Return the path that ``text`` names: as it is where that exists, else with ``~`` for a home directory."""
    path = Path(text)
    if path_exists(path):
        return path.absolute() if text.startswith("~") else path  # so that nobody takes it for a home again
    try:
        return path.expanduser()
    except RuntimeError:  # ~NAME of nobody
        return path


def path_exists(path: Path) -> bool:
    """Whether something is at ``path``; False too for a text that is too long to be one."""
    try:
        return path.exists()
    except OSError:
        return False
