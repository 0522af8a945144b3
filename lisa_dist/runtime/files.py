"""Files: written at once or not at all, strict JSON, a model's refused where they are not whole, and the hub."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

from huggingface_hub import constants

from lisa_dist.config import UserError

logger = logging.getLogger(__name__)

_POINTER = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def check_is_whole(file: Path, key: str) -> None:
    """Raise :class:`UserError` where a file that exists is empty, or only stands for one that Git LFS has not fetched.

    ``key`` is what named its directory, as ``model.path=DIR``, for the message.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_POINTER))
    except OSError as error:
        error.filename = str(file)  # which that of a read lacks
        raise
    if not start:
        raise UserError(f"{key}: {file.name} is empty; copy or download it again")
    if start == _POINTER:
        raise UserError(
            f"{key}: {file.name} is a Git LFS pointer and not the file it stands for; fetch that by `git lfs pull` in "
            f"{file.parent}"
        )


def make_folder(folder: Path, named: str) -> None:
    """Create a folder; raise :class:`UserError` where it can't be. ``named`` is what named it, as ``sweep.dir=DIR``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{named}: can't be written, {error.strerror}") from None


def read_json_object(file: Path, key: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; ``key`` is what named its directory, as ``model.path=DIR``.

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


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a crash, finds the old file or the new one."""
    with replacing_file(path) as file:
        file.write(text.encode())


def write_json_object(fields: dict[str, Any], path: Path) -> None:
    """Write an object as transformers lays its configuration files out, as :func:`write_atomically` does."""
    write_atomically(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in an error of the system that names none, as those of writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path``, flushed to disk, when the context ends without an exception."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path), temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a crash may leave the new name with nothing in it
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder that becomes ``path`` when the context ends without an exception, else is removed.

    Until then ``path`` may be an empty folder; one that holds something by then is an OSError, and so is another
    process that makes the same one.
    """
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    opened = os.open(unfinished, os.O_RDONLY)
    try:
        _hold(opened)
        try:
            for left in unfinished.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield unfinished
            unfinished.replace(path)  # over an empty folder too, never over one that holds something
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        os.close(opened)


def _hold(opened: int) -> None:
    """Lock what is opened until it is closed; an OSError where another process has locked it."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another process is writing it") from None
    except OSError:
        logger.debug("the file system has no locks")


def flush_directory(directory: Path) -> None:
    """Flush to disk which files a directory holds; what is in them is flushed by those who write them."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON: a number that is not finite becomes null, for JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def stay_offline_where_unreachable() -> None:
    """Make the hub's client use its local cache alone where the hub's host has no address.

    On a machine without a way out the client would try again for half a minute before a misspelt path is
    reported. A proxy may know the host where this machine does not, so nothing is changed behind one.
    """
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, None)
    except OSError:
        logger.info("%s can't be reached: only its local cache is used", constants.ENDPOINT)
        constants.HF_HUB_OFFLINE = True
