"""Files and folders are there whole, or as they were."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import pytest
from huggingface_hub import constants

from lisa_dist.runtime.files import (
    new_folder,
    replacing_file,
    stay_offline_where_unreachable,
    write_atomically,
    write_json_object,
)


def fail_while_writing(path: Path) -> None:
    with replacing_file(path) as file:
        file.write(b"half of")
        assert path.read_text() == "old", "a reader finds the old file until the new one is whole"
        raise KeyboardInterrupt


def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new: é")
    assert path.read_bytes() == "new: é".encode() and list(tmp_path.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode), "as the umask says"


def test_an_object_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    write_json_object({"b": "é", "a": [1]}, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == {"b": "é", "a": [1]} and text.startswith('{\n  "b": "é",') and text.endswith("}\n")


def fail_while_filling(folder: Path) -> None:
    with new_folder(folder) as unfinished:
        (unfinished / "first").touch()
        raise KeyboardInterrupt


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_is_there_when_it_is_whole(empty: bool, tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    if empty:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        fail_while_filling(folder)
    assert list((tmp_path / "parent").iterdir()) == ([folder] if empty else [])
    with new_folder(folder) as unfinished:
        (unfinished / "first").touch()
        assert not (folder / "first").exists()
    assert [path.name for path in folder.iterdir()] == ["first"]


def fill_over(folder: Path) -> None:
    with new_folder(folder) as unfinished:
        (unfinished / "theirs").write_text("ours")
        folder.mkdir()
        (folder / "theirs").write_text("theirs")


def test_one_process_makes_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".folder.partial" / "left").mkdir(parents=True)
    with new_folder(tmp_path / "folder") as unfinished:
        (unfinished / "file").touch()
        with pytest.raises(OSError, match="another process is writing it"), new_folder(tmp_path / "folder"):
            pass
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_a_folder_that_came_to_hold_something_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not empty"):
        fill_over(tmp_path / "folder")
    assert (tmp_path / "folder" / "theirs").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("reachable", "proxies", "offline"), [(True, {}, False), (False, {}, True), (False, {"https": "proxy:3128"}, False)]
)
def test_offline_only_without_an_address_and_a_proxy(
    monkeypatch: pytest.MonkeyPatch, reachable: bool, proxies: dict[str, str], offline: bool
) -> None:
    def look_up(host: str, port: object) -> None:
        assert host == "huggingface.co"
        if not reachable:
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    stay_offline_where_unreachable()
    assert constants.HF_HUB_OFFLINE is offline
