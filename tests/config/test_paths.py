from __future__ import annotations

import errno
from pathlib import Path

import pytest

from lisa_dist.config import UserError
from lisa_dist.config.paths import local_path, refusal
from lisa_dist.runtime.files import check_is_whole

REMEDY = "name a path that this account may use"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "/a/b/c: Permission denied"),
        (["train", "run.dir=/a"], "run.dir=/a: Permission denied (/a/b/c)"),
        (["generate", "/a/b/c", "What is /a/b?"], "/a/b/c: Permission denied"),
        (["train", "run.dir=/a/bc", "model.init=random"], "/a/b/c: Permission denied"),
        (["train", "run.dir=."], "/a/b/c: Permission denied"),
    ],
)
def test_a_path_that_is_refused_is_told_with_what_named_it(words: list[str], told: str) -> None:
    assert refusal(PermissionError(errno.EACCES, "Permission denied", "/a/b/c"), words) == f"{told}; {REMEDY}"


def test_a_path_below_here_may_be_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    error = OSError(errno.EROFS, "Read-only file system", "out/x")
    assert refusal(error, ["run.dir=out"]) == f"run.dir=out: Read-only file system ({tmp_path}/out/x); {REMEDY}"


def test_other_errors_are_no_refusals() -> None:
    assert refusal(FileNotFoundError(errno.ENOENT, "No such file or directory", "/a")) is None
    assert refusal(PermissionError(errno.EPERM, "Operation not permitted")) is None, "of no path"
    assert refusal(ValueError("/a")) is None
    assert refusal(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None, "of a process of the program's own"


def test_a_full_disk_is_told_with_what_to_do() -> None:
    full, told = OSError(errno.ENOSPC, "No space left on device", "/a/x"), "free space there, or name a path with more"
    assert refusal(full, ["run.dir=/a"]) == f"run.dir=/a: No space left on device (/a/x); {told}"
    over_quota = OSError(errno.EDQUOT, "Error writing. Detail: 122")
    assert refusal(over_quota) == f"what is written or printed: Disk quota exceeded; {told}"


def test_a_disk_or_file_system_that_fails_is_told(tmp_path: Path) -> None:
    told = "the disk or file system fails, see the system's log (dmesg)"
    stale = OSError(errno.ESTALE, "Stale file handle", "/a/x")
    assert refusal(stale, ["run.dir=/a"]) == f"run.dir=/a: Stale file handle (/a/x); {told}"
    assert refusal(OSError(errno.EIO, "Input/output error")) == (
        f"what is read, written or printed: Input/output error; {told}"
    )
    (tmp_path / "config.json").symlink_to("/proc/self/mem")  # whose first byte can't be read
    with pytest.raises(OSError, match="Input/output error") as failed:
        check_is_whole(tmp_path / "config.json", f"model.path={tmp_path}")
    words = [f"model.path={tmp_path}"]
    assert refusal(failed.value, words) == f"{words[0]}: Input/output error ({tmp_path}/config.json); {told}"


def test_an_account_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(UserError, match=r"^~/x: this account has no home directory; set HOME"):
        local_path("~/x")
    assert local_path("~nobody_of_that_name/x") == Path("~nobody_of_that_name/x")
