import io
import logging

from lisa_dist.telemetry import progress
from lisa_dist.telemetry.progress import ProgressDisplay, announce

ROW = {
    "loss": 2.5, "lr": 2e-5, "tokens_per_second": 12_345.0, "peak_memory_gib": 1.25, "active_layers": [1, 2, 3, 7],
    "step_seconds": 2.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


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
