"""What a model in training makes of data that it is not trained on: held-out loss, and answers to a few prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lisa_dist.data.preview import sample_questions
from lisa_dist.method.probes import mean_loss
from lisa_dist.runtime import distributed
from lisa_dist.training.setup import Run

LONGEST_ANSWER = 48  # tokens


def evaluate(run: Run) -> None:
    """Record the mean loss of the validation set, where there is one. Collective: every rank."""
    if run.validation is not None:
        batches = run.validation.validation_batches(run.config.train.eval_batches)
        train_module = run.train_module
        with run.heartbeat.phase("the evaluation", may_take_long=True):
            loss = mean_loss(train_module.store.module, train_module.objective, train_module.dims, batches)
            run.recorder.record_evaluation(run.progress.step, loss)


def show_answers(run: Run, title: str) -> None:
    """Answer ``train.sample_prompts`` prompts of the validation data and print them. Collective: every rank."""
    count = run.config.train.sample_prompts
    if count == 0:
        return
    source = run.validation or run.batches
    table = Table(title=title, title_justify="left", title_style="bold", show_lines=True)
    columns, rows = ("prompt", "answer", "expected"), []
    for column in columns:
        table.add_column(column, overflow="fold")
    for question in sample_questions(source.sequences, count):
        stop_ids = {int(run.tokenizer.eos_token_id), question.answer_ids[-1]}
        limit = min(LONGEST_ANSWER, 2 * len(question.answer_ids) + 8)
        found = answer(run.train_module.store.module, question.prompt_ids, stop_ids, limit)
        texts = (question.prompt_ids, found, question.answer_ids)
        rows.append([str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in texts])
        table.add_row(*map(Text, rows[-1]))
    run.recorder.record_event(run.progress.step, "answers", title, answers=[dict(zip(columns, row)) for row in rows])
    if distributed.is_main():
        Console(highlight=False).print(table)


@torch.no_grad()
def answer(
    model: nn.Module,
    prompt_ids: list[int],
    stop_ids: set[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    ended: Callable[[list[int]], bool] = lambda answer: False,
) -> list[int]:
    """Return the tokens that the model goes on with, the most likely one each time, without the stopping one.

    The whole text is run through the model for each token, which needs no cache and so no more memory than a
    forward pass: meant for a few short answers. Collective where the model is sharded: every rank, with equal
    arguments.

    Args:
        model: a causal language model; logits are taken from ``model(input_ids=[1, t])``.
        prompt_ids: the prompt.
        stop_ids: tokens that end an answer.
        max_new_tokens: the longest answer.
        temperature: above 0 draws from the softmax of logits / temperature.
        generator: of the draws; the same on every rank.
        ended: whether an answer so far is to be the whole one.
    """
    was_training = model.training
    model.eval()
    device = distributed.device()
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        inputs = torch.tensor([ids], device=device)
        positions = torch.arange(len(ids), device=device)[None]
        logits = model(input_ids=inputs, position_ids=positions).logits[0, -1].float()
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in stop_ids:
            break
        ids.append(chosen)
        if ended(ids[len(prompt_ids) :]):
            break
    model.train(was_training)
    return ids[len(prompt_ids) :]
