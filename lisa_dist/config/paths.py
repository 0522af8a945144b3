"""Paths as a user writes them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import select
from collections.abc import Iterable
from pathlib import Path

from lisa_dist.config.errors import UserError, nearest

BUILTIN_PREFIX = "builtin:"
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
MODEL_CONFIG = "config.json"  # of a Hugging Face model
# owner/name, and after a colon a subset of the data set
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$")
# What the system says of a path as it is named, whoever asks for it: that is the user's to change.
REFUSALS = {getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR")}
FULL = {errno.ENOSPC, errno.EDQUOT}
FAILING = {errno.EIO, errno.ESTALE}  # a disk, or the server of a file system
MODELS = Path(__file__).parents[1] / "models"  # bundled model directories lie here, one a name


def local_path(text: str) -> Path:
    """Return the path that ``text`` names: as it is where that exists, else with ``~`` for a home directory."""
    path = Path(text)
    if path_exists(path):
        return path.absolute() if text.startswith("~") else path  # so that nobody takes it for a home again
    try:
        return path.expanduser()
    except RuntimeError:  # ~NAME of nobody
        if path.parts[0] == "~":
            raise UserError(
                f"{text}: this account has no home directory; set HOME, or write the path without ~"
            ) from None
        return path


def followed(text: str) -> Path:
    """Return the path that ``text`` names, absolute and with its links followed; of links in a circle the first one."""
    return Path(os.path.realpath(local_path(text)))  # where Path.resolve may raise a RuntimeError


def path_exists(path: Path) -> bool:
    """Whether something is at ``path``; False too for a text that is too long to be one."""
    try:
        return path.exists()
    except OSError:
        return False


def refusal(error: BaseException, words: Iterable[str] = ()) -> str | None:
    """Return in a sentence that the system refuses a path as it is named, has no room there or fails there, or refuses
    the output; None for any other error.

    Args:
        error: that was raised.
        words: of the command line, of which one may have named the path, or a folder that it lies in.
    """
    if isinstance(error, BrokenPipeError):
        # Else it is a pipe to another process, which is a fault of the program.
        return "nobody reads any more what is printed, as after a pipe into head" if _nobody_reads() else None
    if not isinstance(error, OSError) or error.errno is None or error.errno not in REFUSALS | FULL | FAILING:
        return None
    said, remedy = os.strerror(error.errno), "name a path that this account may use"
    what = "what is written or printed"
    if error.errno in FULL:
        remedy = "free space there, or name a path with more"
    if error.errno in FAILING:
        what, remedy = "what is read, written or printed", "the disk or file system fails, see the system's log (dmesg)"
    if not isinstance(error.filename, str):  # of a file that is open already
        return None if error.errno in REFUSALS else f"{what}: {said}; {remedy}"
    path = Path(error.filename).absolute()
    for word in words:
        value = word.partition("=")[2] or word
        named = Path(value).expanduser().absolute() if value.startswith("~/") else Path(value).absolute()
        if named == path or (named in path.parents and named not in Path.cwd().parents):
            inside = "" if named == path else f" ({path})"
            return f"{word}: {said}{inside}; {remedy}"
    return f"{path}: {said}; {remedy}"


def _nobody_reads() -> bool:
    """Whether standard output or error is a pipe whose reader is gone."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def nearest_path(path: Path) -> str:
    """Return ``; did you mean X?`` for what is there and has a name most like ``path``, or an empty string."""
    folder = path.absolute().parent
    while not path_exists(folder):
        path, folder = folder, folder.parent
    try:
        close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1, cutoff=0.5)
    except OSError:  # a folder that may not be read, or a file
        close = []
    return f"; did you mean {folder / close[0]}?" if close else ""


def builtin_directory(path: str, key: str, root: Path, file: str) -> Path:
    """Return the folder in ``root`` that ``builtin:NAME`` names; there is one where it holds a ``file``.

    Raises:
        UserError: there is none; ``key`` is what named it.
    """
    known = [f"{BUILTIN_PREFIX}{found.parent.name}" for found in sorted(root.glob(f"*/{file}"))]
    if path not in known:
        raise UserError(f"{key}={path}: bundled are {', '.join(known)}{nearest(path, known)}")
    return root / path.removeprefix(BUILTIN_PREFIX)


def check_model_directory(directory: Path, key: str) -> None:
    """Raise :class:`UserError` where a directory, which ``key`` names as ``model.path=DIR``, holds no model alone."""
    if (directory / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{key}: the directory holds an adapter ({ADAPTER_CONFIG}), which would be left out; merge it into its "
            "model first (merge_and_unload of peft) and name the directory of the result"
        )
    if not (directory / MODEL_CONFIG).is_file():
        raise UserError(f"{key}: the directory has no {MODEL_CONFIG}, so it is no Hugging Face model")


def check_has_weights(directory: Path, key: str, *, or_random: bool = False) -> None:
    """Raise :class:`UserError` where a model's directory, which ``key`` names, holds no safetensors.

    Args:
        directory: of Hugging Face.
        key: what named it, as ``model.path=DIR``.
        or_random: the remedy is to start from random weights, and not to name another directory.
    """
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in directory.glob("*.bin"))
    if pickled:
        raise UserError(
            f"{key}: has {pickled[0]} but no safetensors; unpickling runs code, so convert it first: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    remedy = "model.init=random starts without" if or_random else "name the directory of a trained model"
    raise UserError(f"{key}: has no *.safetensors, so there are no weights to load; {remedy}")


def check_is_new(directory: Path, key: str) -> None:
    """Raise :class:`UserError` where a directory to be written, the value of ``key``, holds something already."""
    if (directory.is_symlink() or directory.exists()) and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{key}={directory}: must be a new or an empty directory, nothing is written over")


def check_may_replace(file: Path, key: str, beginning: str) -> None:
    """Raise :class:`UserError` where ``file``, which ``key`` names, holds what does not begin as its kind does."""
    if file.is_dir():
        raise UserError(f"{key}={file}: is a folder, name a file in it")
    if not begins_with(file, beginning):
        raise UserError(f"{key}={file}: holds something else, which is not written over; name a new file")


def begins_with(file: Path, *beginnings: str) -> bool:
    """Whether a file begins with one of these texts; so does one that is not there, or empty."""
    if not file.is_file() or not file.stat().st_size:
        return True
    with file.open("rb") as opened:
        found = opened.read(max(len(beginning.encode()) for beginning in beginnings))
    return found.startswith(tuple(beginning.encode() for beginning in beginnings))


def model_directory(path: str, key: str = "model.path") -> Path | None:
    """Return the directory that ``path`` names, ``builtin:NAME`` one of this package; None where it is a hub id.

    Raises:
        UserError: ``path`` can only be a directory, and there is none.
    """
    if path.startswith(BUILTIN_PREFIX):
        return builtin_directory(path, key, MODELS, MODEL_CONFIG)
    directory = local_path(path)
    if path_exists(directory):
        if directory.is_dir():
            return directory
        raise UserError(f"{key}={path}: must be a directory or a hub id, not a file; did you mean {directory.parent}?")
    if not HUB_ID.match(path):
        raise UserError(f"{key}={path}: no such directory{nearest_path(directory)}")
    return None
