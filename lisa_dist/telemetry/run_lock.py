"""One start at a time in a run directory: rank 0 of whoever trains there holds a lock, which ends with its process.

Such a lock (fcntl's of records) is exact between processes of one machine, and between machines where the file system
carries it (NFS does). Where it does not, a sign of life from another machine that is written while one looks says the
same. No torch is needed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from lisa_dist.config import UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.files import make_folder, naming
from lisa_dist.telemetry.history import LOST_AFTER

# Seconds until a lock counts as held: a process that was killed may take some to give back its memory, and a rank that
# lives has shown it by then several times.
PATIENCE = 10.0
POLL = 0.1  # seconds


def hold_run(run: RunDirectory) -> TextIO:
    """Return the run's lock, which this process holds until the file is closed.

    Raises:
        UserError: another start is alive there, or the directory can't be written.
    """
    make_folder(run.logs, f"run.dir={run.path}")
    file = run.lock.open("a+", encoding="utf-8")
    try:
        _refuse_living(run, file)
    except UserError:
        file.close()
        raise
    with naming(run.lock):
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
    return file


def check_nobody_trains(run: RunDirectory) -> None:
    """Raise :class:`UserError` where another start is alive in the run's directory."""
    if run.lock.is_file():
        with run.lock.open("r+", encoding="utf-8") as file:
            _refuse_living(run, file)


def _refuse_living(run: RunDirectory, file: TextIO) -> None:
    """Raise :class:`UserError` where another process keeps the lock, or goes on writing signs of life elsewhere."""
    beat = _fresh_beat(run)
    elsewhere = bool(beat) and beat["host"] != socket.gethostname()
    end, mine = time.monotonic() + PATIENCE, None
    while time.monotonic() < end:
        mine = try_lock(file)
        if not elsewhere and (mine or (mine is None and not beat)):
            return
        if beat and _fresh_beat(run).get("alive", 0) > beat["alive"]:
            _refuse(run, _holder(file) if mine is False else beat)
        time.sleep(POLL)
    # An old sign of life is of a process that is gone. A lock that is held is not, though its holder may still prepare.
    if mine is False:
        _refuse(run, _holder(file))


def _holder(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    return _parsed(file.read())


def _refuse(run: RunDirectory, who: dict[str, Any]) -> NoReturn:
    process, host = f"process {who['pid']}" if "pid" in who else "a process", who.get("host", "this machine")
    gone = "" if host == socket.gethostname() else f" (if {host} is gone, delete {run.lock})"
    raise UserError(
        f"run.dir={run.path}: {process} on {host} trains there; stop it first, or choose another directory{gone}"
    )


def _fresh_beat(run: RunDirectory) -> dict[str, Any]:
    """Return rank 0's last sign of life, {} where there is none or it is old."""
    file = run.heartbeat(0)
    try:
        old = time.time() - file.stat().st_mtime > LOST_AFTER
        beat = {} if old else _parsed(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return beat if {"host", "alive"} <= beat.keys() else {}


def try_lock(file: TextIO) -> bool | None:
    """Return whether this process has the lock now, None where the file system has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _parsed(text: str) -> dict[str, Any]:
    """Return the object that a small file holds, {} where it holds none or is just being written."""
    with suppress(ValueError):
        found = json.loads(text)
        return found if isinstance(found, dict) else {}
    return {}
