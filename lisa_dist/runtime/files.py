"""Files of a model directory: what is no whole file, or no JSON, is refused in a sentence before anything reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lisa_dist.config import UserError

_POINTER = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def check_is_whole(file: Path, key: str) -> None:
    """Refuse a file that is empty, or that only stands for one that Git LFS has not fetched.

    Args:
        file: the file; it exists.
        key: what named its directory, as ``model.path=DIR``, for the message.

    Raises:
        UserError: it holds nothing, or is such a pointer.
    """
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if not start:
        raise UserError(f"{key}: {file.name} is empty; copy or download it again")
    if start == _POINTER:
        raise UserError(
            f"{key}: {file.name} is a Git LFS pointer and not the file it stands for; fetch that by `git lfs pull` in "
            f"{file.parent}"
        )


def read_json_object(file: Path, key: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        file: the file; it exists.
        key: what named its directory, as ``model.path=DIR``, for messages.

    Raises:
        UserError: it is empty, a Git LFS pointer, no JSON, or no object.
    """
    check_is_whole(file, key)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {file.name} is no valid JSON ({error}); copy or download it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{key}: {file.name} must hold a JSON object, but holds a {type(fields).__name__}")
    return fields
