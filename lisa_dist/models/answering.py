"""Answers from a model in training, sharded as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lisa_dist.runtime import distributed


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
