"""When the held-out loss ends a run, and which checkpoint it has kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lisa_dist.checkpoint.manifest import checkpoint_name, list_checkpoints, step_of, verify
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_combinations, check_validation
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry.records import read_summary
from lisa_dist.training import evaluation
from lisa_dist.training.evaluation import compare_with_best
from tests.support.ranks import run_on_ranks
from tests.support.runs import Kill, assert_same_run, final_state, make_config, metrics, resuming, train_here

# The held-out loss after each step; the one before training is lower than all.
LOSSES = {0: 1.0, 1: 5.0, 2: 4.0, 3: 4.5, 4: 4.25, 5: 4.0, 6: 3.0}


def config_of(run_dir: Path, *overrides: str) -> Config:
    """Six steps, evaluated after each, whose best loss but the last is that of step 2."""
    return make_config(run_dir, "data.validation=0.1", "train.eval_every=1", "checkpoint.every=0", *overrides)


def train_with_losses(config: Config, kill: Kill | None = None) -> int | None:
    """Train where the held-out losses are ``LOSSES``. Runs on every rank."""

    def measured(run: Any) -> None:
        with mock.patch.object(evaluation, "mean_loss", lambda *arguments: LOSSES[run.progress.step]):
            evaluate(run)

    evaluate = evaluation.evaluate
    with mock.patch("lisa_dist.training.loop.evaluate", measured):
        return train_here(config, kill)


def steps_kept(run_dir: Path) -> list[int]:
    return sorted(step_of(path) or 0 for path in list_checkpoints(run_dir / "checkpoints"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run on two ranks that ended three evaluations after its best, whose checkpoint it kept."""
    run_dir = tmp_path_factory.mktemp("ended")
    settings = ["train.early_stopping_patience=3", "checkpoint.keep_best=true", "checkpoint.keep=1"]
    assert run_on_ranks(2, train_with_losses, config_of(run_dir, *settings, "checkpoint.full_every=9")) == [0, 0]
    yield run_dir


def test_a_run_ends_when_patience_does_and_says_why(ended: Path) -> None:
    summary = read_summary(RunDirectory(ended))
    assert summary is not None
    assert (summary["exit_reason"], summary["final_step"], summary["best_checkpoint"]) == ("finished", 5, 2)
    assert summary["early_stopping"] == (
        "no better held-out loss in 3 evaluations, so the run ends at step 5 of 6 (train.early_stopping_patience=3)"
    )


def test_the_best_checkpoint_is_kept_beside_the_newest_with_what_it_depends_on(ended: Path) -> None:
    assert steps_kept(ended) == [1, 2, 5], "2 is incremental and needs 1, which was the best before"
    assert all(verify(path) is None for path in list_checkpoints(ended / "checkpoints"))


def test_a_resume_of_an_early_end_makes_no_step_until_patience_is_more(ended: Path, tmp_path: Path) -> None:
    before = metrics(ended)
    settings = ["checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.full_every=9", "checkpoint.resume=auto"]
    again = config_of(ended, *settings, "train.early_stopping_patience=3")
    assert run_on_ranks(2, train_with_losses, again) == [0, 0]
    assert metrics(ended) == before
    summary = read_summary(RunDirectory(ended))
    assert summary is not None and summary["best_checkpoint"] == 2 and "early_stopping" in summary
    more = config_of(ended, *settings, "train.early_stopping_patience=4")
    assert run_on_ranks(2, train_with_losses, more) == [0, 0]
    summary = read_summary(RunDirectory(ended))
    assert summary is not None and (summary["final_step"], summary["best_checkpoint"]) == (6, 6)
    assert "early_stopping" not in summary


def test_a_resume_counts_the_evaluations_before_it(tmp_path: Path) -> None:
    settings = [
        "train.early_stopping_patience=3",
        "checkpoint.keep_best=true",
        "checkpoint.every=1",
        "train.log_every=4",
    ]
    whole, cut = config_of(tmp_path / "whole", *settings), config_of(tmp_path / "cut", *settings)
    assert run_on_ranks(1, train_with_losses, whole) == [0]
    assert run_on_ranks(1, train_with_losses, cut, Kill("inside", 5)) == [None]
    assert run_on_ranks(1, train_with_losses, resuming(cut)) == [0]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert steps_kept(tmp_path / "cut") == steps_kept(tmp_path / "whole") == [2, 4, 5]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated on two sequences, whose best loss is that of step 2."""
    run_dir = tmp_path_factory.mktemp("half")
    assert run_on_ranks(1, train_with_losses, config_of(run_dir, "checkpoint.keep_best=true", "train.max_steps=3")) == [
        0
    ]
    return run_dir


@pytest.mark.parametrize(
    ("ranks", "setting", "best"),
    [(1, "train.eval_batches=2", 2), (1, "train.eval_batches=1", 5), (2, "train.eval_batches=2", 5)],
    ids=["the same rows", "fewer", "more, of a second rank"],
)
def test_the_best_loss_is_looked_for_anew_where_others_were_of_other_rows(
    ranks: int, setting: str, best: int, half: Path, tmp_path: Path
) -> None:
    """Else a loss of other rows, which these never reach, stays the best, and patience ends the run."""
    shutil.copytree(half, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint_name(2))
    config = config_of(tmp_path / "run", "checkpoint.keep_best=true", "train.max_steps=5", setting)
    assert run_on_ranks(ranks, train_with_losses, resuming(config)) == [0] * ranks
    progress = final_state(tmp_path / "run")["progress"]
    assert (progress["best_step"], progress["evaluations_since_best"]) == (best, 5 - best)
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert ("the best one is looked for anew" in log) == (best == 5)
    summary = read_summary(RunDirectory(tmp_path / "run"))
    assert summary is not None and summary["best_eval_loss"] == (1 if best == 2 else 4), "of the rows since then"
    assert ("before training it was lower" in log.rpartition("best held-out loss")[2]) == (best == 2)
    assert summary.get("best_checkpoint") == (None if best == 2 else 5), "that of step 2 is gone"


def train_with_a_spike(config: Config) -> int | None:
    """Train where the second step's loss spikes. Runs on a rank."""
    spikes = iter([False, True])
    with mock.patch("lisa_dist.training.loop.is_spike", lambda *arguments: next(spikes, False)):
        return train_with_losses(config)


def test_a_roll_back_to_a_checkpoint_of_other_rows_looks_for_the_best_loss_anew(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half, tmp_path / "run")
    settings = ["train.eval_batches=1", "train.max_steps=5", "train.spike_factor=9"]
    config = config_of(tmp_path / "run", "checkpoint.keep_best=true", *settings)
    assert run_on_ranks(1, train_with_a_spike, resuming(config)) == [0]
    progress = final_state(tmp_path / "run")["progress"]
    assert progress["left_out"] and (progress["best_step"], progress["evaluated_since"]) == (5, 3)
    summary = read_summary(RunDirectory(tmp_path / "run"))
    assert summary is not None and (summary["best_eval_loss"], summary["best_checkpoint"]) == (4.0, 5)


def test_without_patience_the_best_loss_of_a_whole_run_is_told(tmp_path: Path) -> None:
    run_on_ranks(1, train_with_losses, config_of(tmp_path, "checkpoint.keep_best=true", "checkpoint.keep=1"))
    assert steps_kept(tmp_path) == [6]
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert (
        "best held-out loss 3.0000, after step 6: export.step=6 takes it; before training it was lower, 1.0000" in log
    )


def test_only_a_lower_finite_loss_is_better() -> None:
    progress = Progress()
    for step, (loss, since) in enumerate([(float("nan"), 1), (2.0, 0), (2.0, 1), (float("nan"), 2), (1.5, 0)], start=1):
        progress.step = step
        compare_with_best(progress, loss)
        assert progress.evaluations_since_best == since
    assert (progress.best_eval_loss, progress.best_step) == (1.5, 5)


@pytest.mark.parametrize(
    "setting", ["train.early_stopping_patience=2", "checkpoint.keep_best=true"], ids=["patience", "keep_best"]
)
def test_what_follows_the_held_out_loss_is_refused_without_it(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{setting}: .* train.eval_every=0 makes none; set train.eval_every"):
        check_combinations(make_config(tmp_path, setting))
    config = make_config(tmp_path, setting, "train.eval_every=1")
    with pytest.raises(UserError, match=rf"^{setting}: .*there is no validation data; set data.validation"):
        check_validation(config, has_validation=False)
    check_validation(config, has_validation=True)


def test_answers_to_prompts_that_are_trained_on_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sample_questions", lambda sequences, count: [])
    monkeypatch.setattr(evaluation, "answer_questions", lambda run, questions: [])
    run = mock.MagicMock()
    for run.validation, told in (
        (mock.MagicMock(), "answers"),
        (None, "answers, to prompts of rows that are trained on"),
    ):
        evaluation.show_answers(run, "answers")
        assert run.recorder.record_event.call_args.args[2] == told
