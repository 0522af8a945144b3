import math
import re
from contextlib import closing
from html.parser import HTMLParser

import pytest

from lisa_dist.commands import report
from lisa_dist.config import Config, ReportConfig, RunConfig, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry.records import RowWriter, write_summary

CONFIG = "method: lisa\nmodel:\n  path: /models/tiny\nlaunch:\n  setup: [export HF_TOKEN=hidden]\n"


def make_run(run_dir, steps=100, eval_every=25, more=None, **summary):
    more = more or {}
    with closing(RowWriter(RunDirectory(run_dir))) as writer:
        for step in range(1, steps + 1):
            active = [step // 20]
            if step % 20 == 1:
                period = {"period": step // 20, "step": step, "active_layers": active, "num_blocks": 30}
                writer.append(writer.run.layers, period)
            row = {
                "step": step, "epoch": 0.1, "period": step // 20, "active_layers": active,
                "loss": math.nan if step == 7 else 3 - step / 100, "lr": 1e-5, "grad_norm": 1.0, "tokens": 64 + step,
                "label_tokens": 16, "tokens_per_second": 2 * (64 + step), "label_tokens_per_second": 32,
                "step_seconds": 0.5, "data_seconds": 0.125, "peak_memory_gib": 1.5, **more,
            }  # fmt: skip
            writer.append(writer.run.metrics, row)
            if eval_every and step % eval_every == 0:
                writer.append(writer.run.metrics, {"step": step, "eval_loss": 3.25 - step / 100})
    if summary:
        write_summary(RunDirectory(run_dir), **summary)
    return run_dir


def page_of(run_dir):
    assert report.run(Config(run=RunConfig(dir=str(run_dir)))) == 0
    return (run_dir / "report.html").read_text()


class Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_is_whole_and_self_contained(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == [] and parser.addresses == []
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    assert "nan" not in page.lower().replace("finance", "")


def figures_of(page):
    return {name: value for value, name in re.findall(r"<div><b>(.*?)</b><span>(.*?)</span></div>", page)}


def test_a_finished_run(tmp_path, capsys):
    run_dir = make_run(
        tmp_path / "my run", exit_reason="finished", resumed_from=[40], wall_seconds=75.0,
        trained_parameters={"blocks": 1_000_000, "head": 500_000},
        persistent_bytes=3 * 1024**2, peak_memory_gib=1.75, num_blocks=30,
    )  # fmt: skip
    (run_dir / "config.yaml").write_text(CONFIG)
    page = page_of(run_dir)
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    check_is_whole_and_self_contained(page)
    assert figures_of(page) == {
        "steps": "100",
        "last training loss": "2.0000",
        "last validation loss": "2.2500",
        "best validation loss": "2.2500",
        "tokens/s, median": "229",
        "label tokens/s, median": "32",
        "peak memory, rank 0": "1.75 GiB",
        "wall time, since the last start": "1 min 15 s",
        "trained parameters": "1.5 M",
        "persistent, rank 0": "3.0 MiB",
    }
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Loss", "Which block trained when", "Tokens per second", "Seconds a step",
        "Peak memory of rank 0 in each step, GiB",
        "Gradient norm before clipping", "Learning rate",
    ]  # fmt: skip
    assert page.count('class="mark"') == 6  # where it was resumed, in each line chart
    assert "5 periods, 30 blocks" in page and "25 never trained" in page, "only 0 to 4 were drawn"
    assert "method lisa" in page and "/models/tiny" in page
    assert "hidden" not in page and "did not finish" not in page


def test_a_failed_run_tells_why(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=5, eval_every=0, exit_reason="failed: <b>boom</b>", resumed_from=[])
    page = page_of(run_dir)
    assert "did not finish: failed: &lt;b&gt;boom&lt;/b&gt;" in page
    check_is_whole_and_self_contained(page)


def test_a_run_that_failed_before_its_first_step(tmp_path):
    write_summary(RunDirectory(tmp_path / "run"), exit_reason="failed: no memory", resumed_from=[])
    page = page_of(tmp_path / "run")
    assert "failed: no memory" in page and page.count("nothing recorded") == 6 and "no period recorded" in page


def test_a_run_of_one_step_without_summary_or_layers(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1, eval_every=0)
    (run_dir / "layers.jsonl").unlink()
    page = page_of(run_dir)
    check_is_whole_and_self_contained(page)
    assert "no summary" in page and "no period recorded" in page
    assert figures_of(page)["time in steps"] == "0.5 s"


def test_rows_with_nulls_and_missing_keys_and_a_torn_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "lr": null}\n{"step": 2, "loss": 2.5}\n{"step": 3, "eval_loss": null}\n{"ste'
    )
    (tmp_path / "layers.jsonl").write_text('{"period": 0, "step": 1, "active_layers": []}\n')
    page = page_of(tmp_path)
    check_is_whole_and_self_contained(page)
    assert figures_of(page) == {"steps": "2", "last training loss": "2.5000"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such directory"),
        ({}, "neither a step in metrics.jsonl nor a summary.json"),
        ({"metrics.jsonl": '{"step": 1}\nbroken\n{"step": 2}\n'}, r"record is damaged: .*metrics.jsonl, line 2"),
        ({"metrics.jsonl": '{"step": 1}\n', "summary.json": "{"}, "record is damaged"),
        ({"metrics.jsonl": '{"step": 1}\n', "config.yaml": "a: [1\n"}, "config.yaml is damaged"),
    ],
)
def test_what_cannot_be_reported_is_an_error_that_says_why(tmp_path, files, message):
    run_dir = tmp_path / "run"
    if files is not None:
        run_dir.mkdir()
        for name, text in files.items():
            (run_dir / name).write_text(text)
    with pytest.raises(UserError, match=message):
        report.run(Config(run=RunConfig(dir=str(run_dir))))
    assert not (run_dir / "report.html").exists()


def test_a_run_directory_must_be_named():
    with pytest.raises(UserError, match=r"run.dir=null: name the directory"):
        report.run(Config())


def test_the_page_says_what_became_of_the_rows(tmp_path):
    rows = {"read": 40, "used": 17, "cut": 3, "left_out": {"bad: <not> valid JSON": 23}}
    make_run(tmp_path, steps=2, exit_reason="finished", resumed_from=[], rows=rows, validation_rows={**rows, "read": 9})
    page = page_of(tmp_path)
    check_is_whole_and_self_contained(page)
    cells = re.findall("<td[^>]*>([^<]*)</td>", page)
    first = ["read", "40", "used", "17", "cut", "3", "left out: bad: &lt;not&gt; valid JSON", "23"]
    assert cells == [*first, "read", "9", *first[2:]]
    assert page.index("Rows of the data") < page.index("Rows of the validation data")


def test_a_watched_page_loads_itself_anew_until_the_run_has_ended(tmp_path, monkeypatch):
    run = RunDirectory(make_run(tmp_path / "run", steps=2))
    run.logs.mkdir()
    run.heartbeat(0).write_text("{}")
    pages = []

    def a_while_later(seconds):
        pages.append(run.report.read_text())
        if len(pages) == 2:
            write_summary(run, exit_reason="finished", resumed_from=[])
        else:
            with run.metrics.open("a") as file:
                file.write('{"step": 3, "loss": 1.5}\n')

    monkeypatch.setattr(report.time, "sleep", a_while_later)
    assert report.run(Config(run=RunConfig(dir=str(run.path)), report=ReportConfig(watch=True))) == 0
    assert [figures_of(page)["steps"] for page in pages] == ["2", "3"], "written anew"
    assert ['http-equiv="refresh"' in page for page in [*pages, run.report.read_text()]] == [True, True, False]
