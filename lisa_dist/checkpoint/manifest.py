"""What makes a checkpoint complete: a manifest of every file with its size and checksum, written last.

An incremental checkpoint depends on the earlier ones that hold its unchanged weights: it is complete only while theirs
are, and they are kept as long as it is. Its manifest has the checksum of each of their manifests: a run that was set
back may write one of them again, with weights of another history.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lisa_dist.checkpoint.shards import WrittenFile
from lisa_dist.config import UserError
from lisa_dist.runtime.files import write_atomically

MANIFEST, WEIGHTS, MOMENTS, STATE, CONFIG = "manifest.json", "weights", "optimizer", "state.json", "config.yaml"
FORMAT = 3  # of a checkpoint, to be raised when its content or meaning changes; the first had no number
_STEP = re.compile(r"step_(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


def step_of(directory: Path) -> int | None:
    """Return the step of a checkpoint directory's name, None for any other name."""
    match = _STEP.match(directory.name)
    return int(match.group(1)) if match else None


def write_manifest(directory: Path, files: dict[str, WrittenFile], depends_on: list[str]) -> None:
    """Write the manifest, flushed to disk.

    It has every file by its path inside the checkpoint, and the names of the earlier checkpoints that hold the rest of
    its weights.

    Raises:
        OSError: it can't be written, or one of the earlier ones is gone.
    """
    described = {name: asdict(file) for name, file in sorted(files.items())}
    checksums = {base: _checksum_of_manifest(directory.parent / base) for base in depends_on}
    content = {"format": FORMAT, "files": described, "depends_on": checksums}
    write_atomically(directory / MANIFEST, json.dumps(content, indent=1))


def describe_file(path: Path) -> WrittenFile:
    """Return what a manifest says of a file that is there."""
    with path.open("rb") as file:
        return WrittenFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def verify(directory: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, None if it is complete and every checksum holds.

    Only every ``parts``-th file is looked at, from the ``part``-th on, so that ranks can share the reading.
    """
    try:
        files, depends_on = _read_manifest(directory)
        if not {STATE, CONFIG} <= files.keys():
            return f"{MANIFEST} does not list {STATE} and {CONFIG}"
        checked = [(directory, name, expected) for name, expected in files.items()]
        strays = _strays(directory, files)
        for base, checksum in depends_on.items():
            files_of_base, _ = _read_manifest(directory.parent / base)
            if _checksum_of_manifest(directory.parent / base) != checksum:
                return f"{directory.name} depends on {base}, which has been written anew since"
            weights = [name for name in files_of_base if name.startswith(f"{WEIGHTS}/")]
            checked += [(directory.parent / base, name, files_of_base[name]) for name in weights]
            strays += _strays(directory.parent / base, files_of_base)
        if strays:
            return f"{strays[0]} is not of this checkpoint, but of another that was copied over; remove the file"
        found = (_verify_file(*file) for file in checked[part::parts])
        return next((wrong for wrong in found if wrong is not None), None)
    except _ManifestError as error:
        return str(error)
    except OSError as error:
        return f"{directory.name}: {error.filename} can't be read ({error.strerror})"


def check_format(directory: Path) -> None:
    """Check that a checkpoint is of the format that this version reads; a manifest that can't be read says nothing.

    Raises:
        UserError: it is of another one.
    """
    try:
        found = json.loads((directory / MANIFEST).read_text())
        number = found.get("format", 1)
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    if number != FORMAT:
        raise UserError(
            f"{directory}: is a checkpoint of format {number}, this version of lisa_dist reads format {FORMAT}; use "
            f"the version that wrote it, or start again in another run.dir"
        )


def read_dependencies(directory: Path) -> list[str]:
    """Return the names of the earlier checkpoints that this one depends on, [] where its manifest is none."""
    try:
        return list(_read_manifest(directory)[1])
    except _ManifestError:
        return []


def replaced_base(directory: Path) -> str | None:
    """Return the name of an earlier checkpoint that was replaced after this one, which depends on it, or None."""
    try:
        for base, checksum in _read_manifest(directory)[1].items():
            if _checksum_of_manifest(directory.parent / base) != checksum:
                return base
    except (_ManifestError, OSError):  # what can't be read was not replaced, but is damaged
        pass
    return None


def _checksum_of_manifest(directory: Path) -> str:
    return describe_file(directory / MANIFEST).sha256


class _ManifestError(Exception):
    """A manifest is missing or is not one."""


def _read_manifest(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    name = f"{directory.name}/{MANIFEST}"
    try:
        content = json.loads((directory / MANIFEST).read_text())
        files, depends_on = dict(content["files"]), dict(content["depends_on"])
    except FileNotFoundError:
        if not directory.is_dir():
            raise _ManifestError(f"{directory.name} is missing, which holds a part of its weights") from None
        raise _ManifestError(f"{name} is missing: the checkpoint was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise _ManifestError(f"{name} is not readable") from None
    inside = all(isinstance(path, str) and _is_inside(path) for path in files)
    if not inside or not all(isinstance(base, str) and _STEP.fullmatch(base) for base in depends_on):
        raise _ManifestError(f"{name} names files outside the checkpoints")
    return files, depends_on


def _is_inside(name: str) -> bool:
    """Whether ``name`` is a path that cannot lead out of the directory it is relative to."""
    path = Path(name)
    # A path with a NUL raises in every question about it.
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _strays(directory: Path, files: dict[str, Any]) -> list[str]:
    """Return the files of tensors that a checkpoint does not list: readers would take them for ranks' of its own."""
    found = (path for folder in (WEIGHTS, MOMENTS) for path in sorted((directory / folder).glob("*.safetensors")))
    names = (path.relative_to(directory).as_posix() for path in found)
    return [f"{directory.name}/{name}" for name in names if name not in files]


def _verify_file(directory: Path, name: str, expected: Any) -> str | None:
    shown = f"{directory.name}/{name}"
    try:
        size, checksum = expected["bytes"], expected["sha256"]
        if not (directory / name).is_file():
            return f"{shown} is missing"
        if (directory / name).stat().st_size != size:
            return f"{shown} has {(directory / name).stat().st_size} bytes instead of {size}"
        if describe_file(directory / name).sha256 != checksum:
            return f"{shown} has another checksum than when it was written"
    except OSError as error:
        return f"{shown} can't be read ({error.strerror})"
    except (KeyError, TypeError, ValueError):
        return f"{directory.name}/{MANIFEST} is not readable"
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories under ``directory``, newest first, complete or not."""
    found = [path for path in directory.glob("step_*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)
