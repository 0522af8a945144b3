"""What a run says at its end, and what a step adds to its record."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.training.record import StepResult, count_step, last_lines


def test_the_last_lines_say_losses_checkpoint_and_the_next_command(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "my run")
    (run.checkpoints / "step_00000002").mkdir(parents=True)
    (run.checkpoints / "step_00000003").mkdir()
    rows = [
        {"step": 0, "eval_loss": 4.5}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 2.0},
    ]  # fmt: skip
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [
        "training loss    2.0000, -2.0000 (-50%) from 4.0000; best 1.5000 at step 2",
        "validation loss  4.5000",
        f"checkpoint       {run.path}/checkpoints/step_00000003",
    ]
    named = f"'run.dir={run.path}'"
    assert last_lines(run, stopped=True) == [
        "stopped after step 3", *said, f"go on with       lisa-dist train {named} checkpoint.resume=auto",
    ]  # fmt: skip
    assert last_lines(run, stopped=False) == [
        "finished after step 3", *said, f"what it learned  lisa-dist report {named}",
        f"export it        lisa-dist export {named} 'export.path={run.path}_hf'",
    ]  # fmt: skip
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "eval_loss": 5.0}\n')
    run.events.write_text('{"step": 2, "event": "resume", "text": "", "evaluated_since": 2}\n')
    assert "validation loss  5.0000" in last_lines(run, stopped=True), "the other is of other rows"
    run.metrics.unlink()
    assert last_lines(RunDirectory(tmp_path / "nothing"), stopped=False)[0] == "finished after step 0"


def test_the_summary_says_what_a_step_copied_and_what_had_to_be_waited_for() -> None:
    run = mock.MagicMock()
    run.recorder.summary, run.train_module.store.link_misses = {}, 3
    count_step(run, StepResult(mock.MagicMock(), 1.0, 8, 1e-3, False, link_bytes=4096), {})
    assert run.recorder.summary == {"link_bytes_per_step": 4096, "link_misses": 3}
