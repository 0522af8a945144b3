"""Answers to a few held-out prompts, shown before and after training: what the loss means in words."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lisa_dist.data.preview import sample_questions
from lisa_dist.models.answering import answer
from lisa_dist.runtime import distributed
from lisa_dist.training.setup import Run

LONGEST_ANSWER = 48  # tokens


def show_answers(run: Run, title: str) -> None:
    """Answer ``train.sample_prompts`` prompts of the validation data and print them. Collective: every rank."""
    count = run.config.train.sample_prompts
    if count == 0:
        return
    source = run.validation or run.batches
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    for column in ("prompt", "answer", "expected"):
        table.add_column(column, overflow="fold")
    for question in sample_questions(source.sequences, count):
        stop_ids = {int(run.tokenizer.eos_token_id), question.answer_ids[-1]}
        limit = min(LONGEST_ANSWER, 2 * len(question.answer_ids) + 8)
        found = answer(run.learner.sharded.module, question.prompt_ids, stop_ids, limit)
        texts = (question.prompt_ids, found, question.answer_ids)
        table.add_row(*(Text(str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip()) for ids in texts))
    if distributed.is_main():
        Console(highlight=False).print(table)
