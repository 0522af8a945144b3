"""``lisa-dist runs``: how the runs below a folder stand, by what they left there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.cli import main


def make_run(
    path: Path,
    *rows: dict[str, Any],
    summary: dict[str, Any] | str | None = None,
    beat: float | None = None,  # seconds ago
    ended: float = 100,  # seconds ago
    max_steps: int | None = 9,
) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("method: lisa\n")
    (path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (path / "checkpoints" / "step_00000001" / "config.yaml").write_text("method: lisa\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "loss"')
    age(path / "metrics.jsonl", ended)
    age(path / "config.yaml", 10_000)
    if beat is not None:
        note = path / "logs" / "heartbeat_0.json"
        note.parent.mkdir()
        note.write_text(json.dumps({"step": 3, "max_steps": max_steps}))
        age(note, beat)
    if summary is not None:
        (path / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
        age(path / "summary.json", ended)


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


STEP = {"step": 3, "loss": 2.5, "tokens_per_second": 1500.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my runs (old)"
    make_run(folder / "done", {"step": 3, "eval_loss": 3.25}, STEP, summary={"exit_reason": "finished"}, beat=99)
    make_run(folder / "stopped", STEP, summary={"exit_reason": "signal"}, beat=1000, ended=1001)
    make_run(folder / "on", STEP, beat=2)
    make_run(folder / "again", STEP, summary={"exit_reason": "signal"}, beat=2, ended=500)
    make_run(folder / "killed", STEP, summary={"exit_reason": "signal"}, beat=3000, ended=4000)
    make_run(folder / "sweep" / "0_[red]", STEP, summary={"exit_reason": "failed: no memory"}, ended=7000)
    make_run(folder / "torn", STEP, summary="{", beat=20_000, ended=20_000)
    (folder / "new").mkdir()
    (folder / "new" / "config.yaml").write_text("method: lisa\n")
    (folder / "new" / "checkpoints").mkdir()
    return folder


def listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["runs", str(folder), "runs.format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_state_is_told_by_the_summary_or_by_a_newer_sign_of_life(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {os.path.relpath(line["run"], folder): line for line in listed(folder, capsys)}
    states = {name: line["state"] for name, line in lines.items()}
    assert states == {
        "done": "finished", "stopped": "stopped", "on": "running", "again": "running", "killed": "failed",
        "sweep/0_[red]": "failed", "torn": "failed", "new": "starting",
    }  # fmt: skip
    assert lines["sweep/0_[red]"]["reason"] == "no memory"
    assert lines["torn"]["reason"] == "its record is damaged"
    assert lines["done"] | {"run": "", "seconds_since_sign": 0} == {
        "run": "", "state": "finished", "reason": "", "step": 3, "max_steps": 9, "loss": 2.5, "eval_loss": 3.25,
        "tokens_per_second": 1500.0, "seconds_since_sign": 0,
    }  # fmt: skip
    assert 90 < lines["done"]["seconds_since_sign"] < 400


def test_the_last_one_heard_of_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ages = [line["seconds_since_sign"] for line in listed(folder, capsys)]
    assert ages == sorted(ages) and len(ages) == 8


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder)]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "0_[red]" in line)
    assert row.split()[:3] == ["sweep/0_[red]", "failed:", "no"] and "2.5000" in row and "1.5 k" in row
    assert "3/9" in shown and "3.2500" in shown


@pytest.mark.parametrize("text", ["", "{}\n", '{"loss_of": 1}\n', '{"loss": 1'])
def test_a_run_without_a_whole_row_has_no_step(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    [line] = listed(tmp_path, capsys)
    assert (line["step"], line["loss"], line["max_steps"]) == (None, None, None)


def test_records_of_other_programs_do_not_end_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("list", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "list" / "summary.json").write_text("[]")
    (tmp_path / "folder" / "summary.json").mkdir()
    assert [(line["state"], line["reason"]) for line in listed(tmp_path, capsys)] == [
        ("failed", "its record is damaged")
    ] * 2


def test_folders_without_a_run_and_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(tmp_path, capsys) == []
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no run below {tmp_path}\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith(f"lisa-dist: runs.dir={tmp_path}/nowhere: must be a folder")


def test_what_may_not_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    read_text, scandir = Path.read_text, os.scandir
    done, sweep = folder / "done" / "summary.json", folder / "sweep"
    monkeypatch.setattr(Path, "read_text", lambda path, **how: (refuse if path == done else read_text)(path, **how))
    monkeypatch.setattr(os, "scandir", lambda path: (refuse if path == str(sweep) else scandir)(path))
    assert main(["runs", str(folder), "runs.format=json"]) == 0
    shown = capsys.readouterr()
    lines = {os.path.relpath(line["run"], folder): line for line in json.loads(shown.out)}
    assert (lines["done"]["state"], lines["done"]["reason"]) == ("unknown", "its record may not be read")
    assert len(lines) == 7 and lines["stopped"]["state"] == "stopped"
    assert shown.err == f"lisa-dist: {sweep}: Permission denied, what is in it is left out\n"


def test_nobody_waits_for_torch(folder: Path) -> None:
    code = (
        f"import sys; from lisa_dist.cli import main; main(['runs', {str(folder)!r}]);"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_record_of_another_shape_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "text", {"step": 3, "loss": "low"}, beat=2)
    make_run(tmp_path / "list", STEP, beat=2)
    (tmp_path / "list" / "logs" / "heartbeat_0.json").write_text("[1]")
    lines = {Path(line["run"]).name: line for line in listed(tmp_path, capsys)}
    assert (lines["text"]["state"], lines["text"]["reason"]) == ("failed", "its record is damaged")
    assert (lines["list"]["state"], lines["list"]["step"], lines["list"]["max_steps"]) == ("running", 3, None)
    assert main(["runs", str(tmp_path)]) == 0


def test_a_folder_may_have_any_name_and_stand_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "0_lr=1e-5" / "run", STEP, beat=2)
    assert [Path(line["run"]).name for line in listed(tmp_path / "0_lr=1e-5", capsys)] == ["run"]
    assert main(["runs", "runs.format=json", str(tmp_path)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main(["runs", str(tmp_path), str(tmp_path / "0_lr=1e-5")]) == 2
    assert f"and {tmp_path} is given already" in capsys.readouterr().err
