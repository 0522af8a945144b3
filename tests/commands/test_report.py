import base64
import json
import math
import re
import shutil
import subprocess
import zlib
from contextlib import closing
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from lisa_dist.commands import report
from lisa_dist.config import Config, ReportConfig, RunConfig, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry.records import RowWriter, write_summary
from lisa_dist.telemetry.reports import run_page

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
        self.open, self.addresses = [], []  # of link, which only names an icon of nothing

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_is_whole_and_self_contained(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == [] and parser.addresses == ["data:,"]
    assert "http:" not in page and "https:" not in page and "@import" not in page
    packed = re.search('id="library">(.*?)</script>', page).group(1)
    assert b"plotly.js" in zlib.decompress(base64.b64decode(packed))[:200]
    assert "nan" not in page.lower().replace("finance", "").replace(packed.lower(), "")


def charts_of(page):
    """The figures of the page by their headings: each chart's traces by name."""
    found = re.findall(r'<h2>([^<]*)</h2><div class="plot".*?<script type="application/json">(.*?)</script>', page)
    return {heading: json.loads(figure) for heading, figure in found}


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
        "change of training loss": "-0.9900 (-33%)",
        "best training loss, step 100": "2.0000",
        "last validation loss": "2.2500",
        "change of validation loss": "-0.7500 (-25%)",
        "best validation loss, step 100": "2.2500",
        "tokens/s, median": "229",
        "label tokens/s, median": "32",
        "peak memory, rank 0": "1.75 GiB",
        "wall time, since the last start": "1 min 15 s",
        "of the steps waiting for data": "25.0%",
        "trained parameters": "1.5 M",
    }
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Loss", "Which block trained when", "Seconds a step, by part", "Tokens per second",
        "Peak memory of rank 0 in each step, GiB",
        "Gradient norm before clipping", "Learning rate", "Memory of rank 0",
    ]  # fmt: skip
    charts = charts_of(page)
    resumed = [figure["layout"]["shapes"] for figure in charts.values() if "shapes" in figure["layout"]]
    assert [shape["x0"] for shapes in resumed for shape in shapes] == [40] * 5, "in each line chart"
    assert [trace["name"] for trace in charts["Loss"]["data"]] == [
        "training, each step", "training, smoothed", "validation", "switch", "resume",
    ]  # fmt: skip
    assert charts["Loss"]["data"][0]["y"][6] is None, "the loss was not finite"
    assert re.findall("<td[^>]*>([^<]*)</td>", page) == [
        "persistent, counted", "3.0 MiB", "peak, measured", "1.8 GiB",
    ]  # fmt: skip
    assert "5 periods, 30 blocks" in page and "25 never trained" in page, "only 0 to 4 were drawn"
    assert "method lisa" in page and "/models/tiny" in page
    assert "hidden" not in page and "did not finish" not in page


def test_a_failed_run_tells_why(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=5, eval_every=0, exit_reason="failed: <b>boom</b>", resumed_from=[])
    page = page_of(run_dir)
    assert "did not finish: &lt;b&gt;boom&lt;/b&gt;" in page
    check_is_whole_and_self_contained(page)


def test_a_run_that_failed_before_its_first_step(tmp_path):
    write_summary(RunDirectory(tmp_path / "run"), exit_reason="failed: no memory", resumed_from=[])
    page = page_of(tmp_path / "run")
    assert "did not finish: no memory" in page and page.count("nothing recorded") == 7 and "no period recorded" in page


def test_a_run_of_one_step_without_summary_or_layers(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=1, eval_every=0)
    (run_dir / "layers.jsonl").unlink()
    page = page_of(run_dir)
    check_is_whole_and_self_contained(page)
    assert "ended without being able to say why" in page and "no period recorded" in page
    assert figures_of(page)["time in steps"] == "0.5 s"


def test_a_row_counts_for_all_steps_since_the_row_before(tmp_path):
    with closing(RowWriter(RunDirectory(tmp_path))) as writer:
        for step, seconds, waited in ((10, 0.5, 0.25), (20, 1.0, 0.0), (25, 3.0, 1.5)):
            row = {"step": step, "loss": 2.0, "step_seconds": seconds, "data_seconds": waited}
            writer.append(writer.run.metrics, row)
    figures = figures_of(page_of(tmp_path))
    assert figures["time in steps"] == "30 s" and figures["of the steps waiting for data"] == "33.3%"


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
        ({"metrics.jsonl": '{"loss": 2.5}\n'}, "record is damaged: .*metrics.jsonl, line 1: has no step"),
        ({"metrics.jsonl": '{"step": 1, "loss": "low"}\n'}, "metrics.jsonl, line 1: loss=low is nothing that a run"),
        ({"metrics.jsonl": '{"step": 1}\n', "layers.jsonl": '{"step": 1}\n'}, "layers.jsonl, line 1: has no active_la"),
        ({"metrics.jsonl": '{"step": 1}\n', "events.jsonl": '{"step": 1}\n'}, "events.jsonl, line 1: has no event"),
        ({"summary.json": '{"persistent_bytes": {"gradients": "1"}}'}, "persistent_bytes=.* is nothing that a run wr"),
        ({"summary.json": '{"rows": {"left_out": 3}}'}, "summary.json: rows=.* is nothing that a run writes"),
        ({"summary.json": '{"weight_norms": [1]}'}, "summary.json: weight_norms=.1. is nothing that a run writes"),
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
    assert cells[2:] == [*first, "read", "9", *first[2:]]
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


def make_rich_run(run_dir, steps=60):
    """Add to a run what longer ones leave: parts of steps, norms, events, a plan, the law."""
    make_run(
        run_dir, steps=steps, more={"part_seconds": {"forward": 0.125, "backward": 0.1875}}, exit_reason="finished",
        resumed_from=[], final_step=steps, weight_norms={"2": 6.0}, law="2 P_f + 18 P_a", law_bytes=1024**2,
        persistent_bytes={"gradients": 2**20, "masters": 2**21}, num_blocks=30,
    )  # fmt: skip
    run = RunDirectory(run_dir)
    layers = [
        {"period": index, "step": 1 + 20 * index, "active_layers": [index], "num_blocks": 30, "weight_norms": norms}
        for index, norms in enumerate([{"0": 4.0}, {"0": 5.0, "1": 2.0}, {"1": 2.5, "2": 5.0}])
    ]
    run.layers.write_text("".join(json.dumps(row) + "\n" for row in layers))

    def answers(text):
        return [{"prompt": "Why </script>?", "answer": text, "expected": "Because <b>."}]

    events = [
        {"step": 0, "event": "answers", "text": "", "answers": answers("the the")},
        {"step": 9, "event": "fault", "text": "step 9: not finite"},
        {"step": 40, "event": "resume", "text": "went on from </script> 40"},
        {"step": 50, "event": "roll-back", "text": "back"},
        {"step": steps, "event": "answers", "text": "", "answers": answers("Because <a>.")},
    ]
    run.events.write_text("".join(json.dumps(row) + "\n" for row in events))
    run.plan.write_text(json.dumps({"persistent_bytes": {"gradients": 2**20}, "peak_bytes": 2**30, "peak_at": "step"}))
    return run_dir


def test_answers_of_a_resume_with_other_prompts_stand_beside_their_own():
    def given(step, prompts):
        answers = [{"prompt": p, "expected": "e", "answer": f"{p} at {step}"} for p in prompts]
        return {"step": step, "event": "answers", "text": "", "answers": answers}

    record = SimpleNamespace(events=[given(0, ["one", "two", "three"]), given(5, ["three", "one"])])
    (card,) = run_page._answers_card(record)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", str(card.body))
    assert cells[2:4] == ["one at 0", "one at 5"] and cells[6:8] == ["two at 0", "not asked"]
    assert cells[10:12] == ["three at 0", "three at 5"]


def test_answers_parts_of_a_step_norms_memory_and_events(tmp_path):
    page = page_of(make_rich_run(tmp_path / "run"))
    check_is_whole_and_self_contained(page)
    charts = charts_of(page)
    cells = re.findall("<td[^>]*>([^<]*)</td>", page)
    assert cells[:4] == ["Why &lt;/script&gt;?", "Because &lt;b&gt;.", "the the", "Because &lt;a&gt;."]
    assert cells[4:] == [
        "persistent, by the law 2 P_f + 18 P_a", "1.0 MiB", "persistent, planned", "1.0 MiB", "\u2003gradients",
        "1.0 MiB", "persistent, counted", "3.0 MiB", "\u2003gradients", "1.0 MiB", "\u2003masters", "2.0 MiB",
        "peak, planned (in step)", "1.0 GiB", "peak, measured", "1.5 GiB",
    ]  # fmt: skip
    parts = {trace["name"]: trace["y"][0] for trace in charts["Seconds a step, by part"]["data"]}
    assert parts == {"waiting for data": 0.125, "forward": 0.125, "backward": 0.1875, "everything else": 0.0625}
    told = {trace["name"]: trace.get("text") for trace in charts["Loss"]["data"]}
    assert told["fault"] == ["step 9: not finite"] and told["resume"] == ["went on from </script> 40"]
    assert told["roll-back"] == ["back"] and told["switch"][1] == "period 1: blocks 1"
    [norms] = charts["Weight norm of each block"]["data"]
    assert norms["x"] == [0, 20, 40, 60] and norms["customdata"][2] == [None, None, 5.0, 6.0]


def test_many_steps_are_thinned_and_the_page_says_so(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=3000, eval_every=0))
    assert "Of 3,000 steps each chart draws about 1,000 points a line" in page
    assert len(charts_of(page)["Learning rate"]["data"][0]["x"]) <= 1000
    assert len(page) < 3 * 2**20


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")
def test_a_browser_draws_every_chart_without_a_complaint(tmp_path):
    run_dir = make_rich_run(tmp_path / "run", steps=60)
    charts = charts_of(page_of(run_dir))
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", f"file://{run_dir}/report.html"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert 'data-drawn="true"' in done.stdout and done.stdout.count('class="main-svg"') >= len(charts) == 8


def test_held_out_losses_of_other_rows_are_not_compared(tmp_path):
    make_run(tmp_path, steps=4, eval_every=1)
    events = [
        {"step": 2, "event": "resume", "text": "", "evaluated_since": 2},
        {"step": 3, "event": "fault", "text": ""},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events))
    figures = figures_of(page_of(tmp_path))
    assert figures["change of validation loss"] == "-0.0100 (-0%)" and "best validation loss, step 4" in figures


@pytest.mark.parametrize(("key", "writes"), [("run", "write_report"), ("sweep", "write_comparison")])
def test_a_full_disk_is_told(key, writes, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, writes, full)
    config = Config()
    getattr(config, key).dir = str(tmp_path)
    with pytest.raises(UserError, match=f"^{key}.dir={tmp_path}: its pages? can't be written, No space left on device"):
        report.run(config)


def test_a_summary_and_a_plan_that_lack_keys_are_shown_without(tmp_path):
    summary = {"law_bytes": 2**20, "weight_norms": {"0": 1.0}, "rows": {"read": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "plan.json").write_text('{"peak_bytes": 1073741824}')
    page = page_of(tmp_path)
    assert "<td>persistent, by the law</td>" in page and "<td>peak, planned</td>" in page
    assert page_of(tmp_path) == page, "a page of a run is written anew"
    (tmp_path / "report.html").write_text("<html>mine")
    with pytest.raises(UserError, match=r"holds a report\.html of another program, which is kept"):
        page_of(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<html>mine"
