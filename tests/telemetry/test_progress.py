import io
import logging
import sys

import pytest

from lisa_dist.telemetry import progress
from lisa_dist.telemetry.progress import ProgressDisplay, announce
from tests.support.terminal import Terminal

ROW = {
    "loss": 2.5, "lr": 2e-5, "tokens_per_second": 12_345.0, "peak_memory_gib": 1.25, "active_layers": [1, 2, 3, 7],
    "step_seconds": 2.0,
}  # fmt: skip


def test_without_a_terminal_a_plain_line_now_and_then(caplog, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO), ProgressDisplay(max_steps=40) as display:
        for step in range(1, 41):
            clock[0] += 2.0
            display.update({"step": step, **ROW})
    lines = [record.getMessage() for record in caplog.records]
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    assert lines[0] == "step 1/40  loss 2.5000  lr 2.00e-05  12.3 k tokens/s  1.25 GiB  blocks 1-3, 7  1 min 18 s to go"
    assert capsys.readouterr().out == ""


def test_a_validation_is_told_at_once_and_stays_in_the_line(caplog):
    with caplog.at_level(logging.INFO), ProgressDisplay(max_steps=2) as display:
        display.update({"step": 1, **ROW})
        display.update({"step": 1, "eval_loss": 2.25})
        display.update({"step": 2, **ROW})
    assert "eval loss 2.2500" in caplog.records[1].getMessage()
    assert "eval 2.2500" in caplog.records[2].getMessage()


def test_on_a_terminal_a_bar_and_no_lines(caplog, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", terminal)
    with caplog.at_level(logging.INFO), ProgressDisplay(max_steps=4, first_step=2) as display:
        display.update({"step": 3, **ROW})
        display.update({"step": 3, "eval_loss": 2.25})
        display.update({"step": 4, **ROW})
    assert not caplog.records
    shown = terminal.getvalue()
    assert "4/4" in shown and "loss 2.5000" in shown and "eval 2.2500" in shown and "blocks 1-3, 7" in shown


def test_the_table_of_what_is_effective(capsys):
    announce({"ranks": "2 on cpu", "attention": "sdpa"}, title="Effective settings")
    out = capsys.readouterr().out
    assert "Effective settings" in out and "2 on cpu" in out and "sdpa" in out


def test_other_ranks_show_nothing(caplog, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_main", lambda: False)
    announce({"ranks": "2"})
    with caplog.at_level(logging.INFO), ProgressDisplay(max_steps=2) as display:
        display.update({"step": 1, **ROW})
        display.update({"step": 1, "eval_loss": 1.0})
    assert not caplog.records and capsys.readouterr().out == ""


def test_brackets_are_no_markup(capsys):
    announce({"data": "/data/[v2] new/[/INST].jsonl"})
    assert "/data/[v2] new/[/INST].jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 200])
def test_the_screen_has_one_bar_that_names_what_takes_long(width, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    blocks = {"active_layers": list(range(0, 60, 2))}  # more than a line has place for
    doing = ("the evaluation", 0.5)
    with ProgressDisplay(max_steps=40, doing=lambda: doing) as display:
        display.update({"step": 1, **ROW, **blocks})
        display.live.refresh()
        bar, line = terminal.screen(width)
        assert bar.startswith("step  1/40") and bar.endswith(" 1 min 18 s to go") and line.startswith("loss 2.5000")
        doing = ("the dry run of the longest micro-batch", 75.0)
        display.live.refresh()
        bar, line = terminal.screen(width)
        assert bar.startswith("step  1/40") and bar.endswith(f" {doing[0]}, 1 min 15 s")
        assert len(bar) == width and line.endswith("…") == (width == 80)
        print("a line of the log", file=sys.stderr)
        announce({"a table": "of one line"})
        doing = ("forward", 0.1)
        display.update({"step": 1, "eval_loss": 2.25})
        display.live.refresh()
        above = terminal.screen(width)
        assert above[0] == "a line of the log" and above[2] == "│ a table │ of one line │" and len(above) == 6
        assert above[1][0] == "┌" and above[3][0] == "└", "no line is lost under the bar"
        assert above[4].endswith("to go") and above[5].startswith("loss 2.5000  eval 2.2500")
        doing = ("the checkpoint", 4.0)
    shown = [line for line in terminal.screen(width) if line]
    assert shown[:4] == above[:4] and len(shown) == 6, "nothing is left of what was shown before"
    assert shown[4].startswith("step  1/40") and "go" not in shown[4] and "checkpoint" not in shown[4]


def test_what_goes_to_a_file_is_not_shown_beside_the_bar(monkeypatch):
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", file)
    with ProgressDisplay(max_steps=4):
        print("a warning", file=sys.stderr)
    assert file.getvalue() == "a warning\n" and "a warning" not in terminal.getvalue()


def test_without_a_terminal_a_part_that_takes_long_has_a_line_now_and_then(caplog):
    seconds = [5.0]
    display = ProgressDisplay(max_steps=40, first_step=10, doing=lambda: ("the checkpoint", seconds[0]))
    longer_than = progress.SILENCE
    with caplog.at_level(logging.INFO):
        for seconds[0] in (5.0, 29.0, 31.0, 45.0, 63.0, 100.0, 130.0, 2.0, 29.0, 30.0):
            longer_than = display.tell_of_part(longer_than)
    told = [record.getMessage() for record in caplog.records]
    expected = ["31 s", "1 min 03 s", "2 min 10 s", "30 s"]
    assert told == [f"step 10/40  the checkpoint, for {text}" for text in expected]
