"""What a model in training makes of data that it is not trained on: held-out loss, and answers to a few prompts."""

from __future__ import annotations

import logging
import math

from rich.table import Table
from rich.text import Text

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.preview import Question, sample_questions
from lisa_dist.method.probes import mean_loss
from lisa_dist.runtime import distributed
from lisa_dist.telemetry.history import read_rows
from lisa_dist.telemetry.progress import print_table
from lisa_dist.training.generation import AnswerSettings, ends_of
from lisa_dist.training.setup import Run

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 48  # tokens


def evaluate(run: Run) -> None:
    """Record the mean loss of the validation set, where there is one. Collective: every rank."""
    if run.validation is not None:
        batches = run.validation.validation_batches(run.config.train.eval_batches)
        train_module = run.train_module
        with run.heartbeat.phase("the evaluation", may_take_long=True):
            loss = mean_loss(train_module.store.module, train_module.objective, train_module.dims, batches)
            run.recorder.record_evaluation(run.progress.step, loss)
        if run.progress.step > 0:  # what was there before training is no result of it
            compare_with_best(run.progress, loss)


def compare_with_best(progress: Progress, eval_loss: float) -> None:
    """Remember a held-out loss that is lower than all before, or count one that is not."""
    best = progress.best_eval_loss
    if math.isfinite(eval_loss) and (best is None or eval_loss < best):
        progress.best_eval_loss, progress.best_step, progress.evaluations_since_best = eval_loss, progress.step, 0
    else:
        progress.evaluations_since_best += 1


def ends_early(run: Run) -> bool:
    """Whether ``train.early_stopping_patience`` evaluations went by without a better held-out loss."""
    return 0 < run.config.train.early_stopping_patience <= run.progress.evaluations_since_best


def is_best_to_keep(run: Run) -> bool:
    """Whether the evaluation of this step found the best loss so far, and the run keeps its checkpoint."""
    return run.config.checkpoint.keep_best and run.progress.best_step == run.progress.step


def may_save_after_evaluation(config: Config) -> bool:
    """Whether an evaluation can call for a checkpoint that is not due."""
    return config.checkpoint.keep_best or config.train.early_stopping_patience > 0


def best_is_kept(run: Run) -> bool:
    """Whether there is a checkpoint of the best held-out loss; it may have failed to be written, or been removed."""
    best = run.progress.best_step
    return best is not None and (run.checkpoints.directory / checkpoint_name(best)).is_dir()


def note_best(run: Run) -> None:
    """Have summary.json name the checkpoint of the best held-out loss, where the run keeps one and it is there."""
    if run.config.checkpoint.keep_best and best_is_kept(run):
        run.recorder.summary["best_checkpoint"] = run.progress.best_step


def tell_of_best(run: Run) -> None:
    """Say why the run ended early, where it did, and where its best held-out loss was; its checkpoints are written."""
    if not distributed.is_main() or not may_save_after_evaluation(run.config):
        return
    progress, best = run.progress, run.progress.best_eval_loss
    if ends_early(run):
        why = (
            f"no better held-out loss in {progress.evaluations_since_best} evaluations, so the run ends at step "
            f"{progress.step} of {run.max_steps} (train.early_stopping_patience="
            f"{run.config.train.early_stopping_patience})"
        )
        run.recorder.summary["early_stopping"] = why
        logger.info("%s", why)
    if best is None or progress.best_step is None:
        logger.warning("no evaluation found a finite held-out loss")
        return
    kept = best_is_kept(run)
    absent = (
        "its checkpoint is gone" if run.config.checkpoint.keep_best else "checkpoint.keep_best=true would have kept it"
    )
    where = f"export.step={progress.best_step} takes it" if kept else absent
    lowest = run.recorder.summary.get("best_eval_loss", best)
    untrained = f"; before training it was lower, {lowest:.4f}" if lowest < best else ""
    logger.info("best held-out loss %.4f, after step %d: %s%s", best, progress.best_step, where, untrained)


def show_answers(run: Run, title: str) -> None:
    """Answer ``train.sample_prompts`` prompts, of held-out rows where there are any, and print them. Collective."""
    count = run.config.train.sample_prompts
    if count == 0:
        return
    source = run.validation or run.batches
    title += "" if run.validation else ", to prompts of rows that are trained on"
    questions = sample_questions(source.sequences, count)
    with run.heartbeat.phase("the answers to sample prompts", may_take_long=True):
        answers = answer_questions(run, questions)
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    columns, rows = ("prompt", "answer", "expected"), []
    for column in columns:
        table.add_column(column, overflow="fold")
    for question, found in zip(questions, answers):
        texts = (question.prompt_ids, found, question.answer_ids)
        rows.append([str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in texts])
        table.add_row(*map(Text, rows[-1]))
    if distributed.is_main():
        made = [dict(zip(columns, row)) for row in rows]
        known = [event for event in read_rows(run.recorder.run.events) if event["step"] == run.progress.step]
        if made not in [event.get("answers") for event in known]:  # a run that was at its end already has them
            run.recorder.record_event(run.progress.step, "answers", title, answers=made)
        print_table(table)


def answer_questions(run: Run, questions: list[Question]) -> list[list[int]]:
    """Return the answers' tokens, each about as long as the expected one at most. Collective: every rank."""
    limits = [min(LONGEST_ANSWER, 2 * len(question.answer_ids) + 8) for question in questions]
    ends = ends_of(run.tokenizer, run.train_module, str(RunDirectory.of(run.config).model))
    settings = AnswerSettings(frozenset(ends), max(limits, default=1))
    found = run.answerer.answers([question.prompt_ids for question in questions], settings)
    return [answer[:limit] for answer, limit in zip(found, limits)]
