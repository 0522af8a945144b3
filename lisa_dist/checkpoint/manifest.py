"""What makes a checkpoint complete: a manifest of every file with its size and checksum, written last."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from lisa_dist.telemetry.records import write_atomically

MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def step_of(directory: Path) -> int | None:
    """Return the step of a checkpoint directory's name, None for any other name."""
    match = _STEP.match(directory.name)
    return int(match.group(1)) if match else None


def write_manifest(directory: Path) -> None:
    """List every file of a checkpoint with size and SHA-256, flushed to disk."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomically(directory / MANIFEST, json.dumps({"files": files}, indent=1))


def damage(directory: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if it is complete and every checksum holds."""
    manifest = directory / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
        for name, expected in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if file_checksum(path) != expected["sha256"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the checkpoint was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories under ``directory``, newest first, complete or not."""
    found = [path for path in directory.glob("step_*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def remove_old(directory: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints (0: keep all)."""
    if keep > 0:
        for old in list_checkpoints(directory)[keep:]:
            shutil.rmtree(old, ignore_errors=True)


def file_checksum(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
