"""sweep.csv and index.html, from made-up jobs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.config import UserError
from lisa_dist.launching.sweeps.comparison import COLUMNS, best_job, read_jobs, write_comparison
from lisa_dist.telemetry.reports.page import PAGE_START


def make_job(
    sweep_dir: Path, name: str, *overrides: str, code: int | None = 0, losses: tuple[float, ...] = (),
    evals: tuple[float | None, ...] = (), **summary: Any,
) -> None:  # fmt: skip
    """Add a job to the file of jobs, and what it left in its directory: a row a loss, then one an evaluation."""
    run_dir = sweep_dir / name
    run_dir.mkdir(parents=True)
    with (sweep_dir / "jobs.txt").open("a") as file:
        file.write(shlex.join([name, *overrides, "checkpoint.resume=auto", f"run.dir=/elsewhere/{name}"]) + "\n")
    if code is not None:
        (run_dir / "exit_code").write_text(f"{code}\n")
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": loss, "tokens_per_second": 100.0 * step, "peak_memory_gib": 1.0 + step}
        for step, loss in enumerate(losses, start=1)
    ]
    rows += [{"step": len(losses), "eval_loss": loss} for loss in evals]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (run_dir / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    same = "train.max_steps=3"
    make_job(
        folder, "0_a", "lr=1", same, losses=(3.0, 2.5, 2.0), evals=(2.25,), exit_reason="finished", peak_memory_gib=9
    )
    make_job(folder, "1_b", "lr=2", same, losses=(3.0, 2.0, 1.5), evals=(2.5,), exit_reason="finished")
    make_job(folder, "2_c", "lr=3", same, code=1, losses=(4.0,), exit_reason="failed: ValueError: <boom>, again")
    make_job(folder, "3_d", "lr=4", same, code=75, losses=(3.5,), exit_reason="signal")
    make_job(folder, "4_e", "lr=5", same, code=2)
    (folder / "4_e" / "job.log").write_text("a line\nlisa-dist: lr=5: must be smaller\n")
    make_job(folder, "5_f", "lr=6", same, code=None)
    return folder


def test_table(sweep_dir: Path) -> None:
    write_comparison(sweep_dir)
    with (sweep_dir / "sweep.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == [
        "job", "overrides", "run_dir", "state", "exit_code", "reason", "final_loss", "eval_loss", "peak_memory_gib",
        "tokens_per_second",
    ] == list(COLUMNS)  # fmt: skip
    cells = [dict(zip(COLUMNS, row)) for row in rows[1:]]
    assert cells[0] == {
        "job": "0", "overrides": "lr=1 train.max_steps=3", "run_dir": str(sweep_dir / "0_a"), "state": "finished",
        "exit_code": "0", "reason": "", "final_loss": "2.0", "eval_loss": "2.25", "peak_memory_gib": "9",
        "tokens_per_second": "200.0",
    }  # fmt: skip
    assert cells[1]["peak_memory_gib"] == "4.0"  # the largest of the steps where the summary has none
    told = [(cell["state"], cell["exit_code"], cell["reason"]) for cell in cells]
    assert told[2:] == [
        ("failed", "1", "ValueError: <boom>, again"),
        ("stopped", "75", "stopped on a signal, after a checkpoint"),
        ("failed", "2", "lr=5: must be smaller"),
        ("stopped", "", "not ended yet"),
    ]
    assert cells[5]["final_loss"] == cells[5]["tokens_per_second"] == ""


def test_best_job_has_the_lowest_validation_loss_of_those_that_finished(sweep_dir: Path) -> None:
    jobs = read_jobs(sweep_dir)
    assert best_job(jobs) is jobs[0]
    (sweep_dir / "0_a" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')  # not comparable by it any more
    jobs = read_jobs(sweep_dir)
    assert best_job(jobs) is jobs[1]
    assert best_job(jobs[2:]) is None


def test_a_job_whose_last_validation_loss_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    make_job(tmp_path, "0_a", "lr=1", losses=(3.0, 1.0), evals=(1.5, None))  # diverged after its best evaluation
    make_job(tmp_path, "1_b", "lr=9", losses=(3.0, 2.0), evals=(2.5, 2.25))
    jobs = write_comparison(tmp_path)
    assert best_job(jobs) is jobs[1] and best_job(jobs[:1]) is None
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["eval_loss"] for row in csv.DictReader(file)] == ["inf", "2.25"]
    assert "1 ★ best" in (tmp_path / "index.html").read_text()


def test_page(sweep_dir: Path) -> None:
    write_comparison(sweep_dir)
    page = (sweep_dir / "index.html").read_text()
    assert '<td><a href="0_a/report.html">0 ★ best</a></td><td>lr=1</td><td>finished</td>' in page
    assert page.count("★") == 1
    assert "failed: ValueError: &lt;boom&gt;, again" in page
    assert '<p class="soft">train.max_steps=3</p>' in page
    assert "2.2500" in page and "9" in page and "200" in page
    assert "http:" not in page and "https:" not in page
    headings = ["Jobs", "Validation loss by lr", "Training loss", "Validation loss"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings
    varied = json.loads(re.findall('<script type="application/json">(.*?)</script>', page)[0])["data"][0]
    assert (varied["x"], varied["y"]) == ([1, 2], [2.25, 2.5]) and varied["text"][0].startswith("job 0: lr=1")


def test_each_job_that_has_ended_and_left_a_record_has_a_page_that_is_written_once(sweep_dir: Path) -> None:
    write_comparison(sweep_dir)
    pages = sorted(page.parent.name for page in sweep_dir.glob("*/report.html"))
    assert pages == ["0_a", "1_b", "2_c", "3_d"]
    page = sweep_dir / "0_a" / "report.html"
    page.write_text(f"{PAGE_START}> as it was")
    write_comparison(sweep_dir)
    assert page.read_text().endswith("as it was")
    (sweep_dir / "0_a" / "exit_code").write_text("0\n")  # it ran again
    later = page.stat().st_mtime + 5
    os.utime(sweep_dir / "0_a" / "exit_code", (later, later))
    write_comparison(sweep_dir)
    assert "<h1>0_a</h1>" in page.read_text()
    page.write_text("of another program")
    os.utime(page, (0, 0))
    write_comparison(sweep_dir)
    assert page.read_text() == "of another program"


def test_sweep_that_was_moved(sweep_dir: Path) -> None:
    moved = sweep_dir.rename(sweep_dir.parent / "moved")
    assert [job.run_dir.parent for job in read_jobs(moved)] == [moved] * 6


def test_no_sweep_and_damaged_records(sweep_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sweep\.dir=.*nowhere: must be the directory of a sweep"):
        write_comparison(tmp_path / "nowhere")
    (sweep_dir / "1_b" / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"1_b: the record of this job is damaged"):
        write_comparison(sweep_dir)
