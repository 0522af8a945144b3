"""Answers with transformers' cache, in batches and on two ranks, are those of the whole text run again each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lisa_dist.config.loading import load
from lisa_dist.data.preview import Question
from lisa_dist.data.stops import stop_ids
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.training import evaluation
from lisa_dist.training.generation import KeyedDraws, draw_keys
from tests.support.answers import CASES, HOW, NEW_TOKENS, answerer_of, greedy, prompts
from tests.support.ranks import run_on_ranks


def run_again_for_each_token(module: Any, prompt: list[int]) -> list[int]:
    """The most likely tokens, by the model as it runs in training."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            positions = torch.arange(len(ids))[None]
            logits = module(input_ids=torch.tensor([ids]), position_ids=positions).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def answers_of(stops: dict[str, int]) -> dict[str, list[list[int]]]:
    """Answers of every case, in batches of three; runs on a rank."""
    return {name: answerer_of(name).answers(prompts(), greedy(stop, batch_size=3)) for name, stop in stops.items()}


def expected_answers() -> dict[str, tuple[str, list[list[int]]]]:
    """How the cache of every case is used, and the answers; runs on a rank."""
    found = {}
    for name in CASES:
        answerer = answerer_of(name)
        module = answerer.module.eval()
        found[name] = answerer.cache_use, [run_again_for_each_token(module, prompt) for prompt in prompts()]
    return found


def test_answers_are_those_of_the_whole_text_run_again() -> None:
    (expected,) = run_on_ranks(1, expected_answers)
    assert {name: use for name, (use, _) in expected.items()} == HOW
    for name, (_, answers) in expected.items():
        assert len({tuple(answer) for answer in answers}) > 2, (name, "answers that are alike show nothing")
    # A token in the middle of an answer ends it, so that rows and ranks are done at different times.
    stops = {name: answers[0][5] for name, (_, answers) in expected.items()}
    cut = {
        name: [answer[: answer.index(stops[name])] if stops[name] in answer else answer for answer in answers]
        for name, (_, answers) in expected.items()
    }
    assert any(len(answer) == NEW_TOKENS for answer in cut["llama"]) and len(cut["llama"][0]) < NEW_TOKENS
    assert run_on_ranks(1, answers_of, stops) == [cut]
    # With and without a cache, with adapters and experts; FSDP2 shards integers from torch 2.13 on.
    of_integers = ["qwen2, int8"] if torch.__version__ < "2.13" else []
    for name in ("mistral", "gpt2", "llama, packed", "llama, streamed", *of_integers):
        del stops[name], cut[name]
    assert run_on_ranks(2, answers_of, stops) == [cut, cut]


def drawn_answers() -> dict[str, list[list[int]]]:
    """Draws in batches and one by one, in another order and with another seed; runs on a rank."""
    answerer, asked = answerer_of("llama"), prompts()
    warm = {"temperature": 0.7, "seed": 3}
    return {
        "together": answerer.answers(asked, greedy(**warm, batch_size=5)),
        "alone": answerer.answers(asked, greedy(**warm, batch_size=1)),
        "reversed": answerer.answers(asked[::-1], greedy(**warm))[::-1],
        "another seed": answerer.answers(asked, greedy(temperature=0.7, seed=4)),
        "twice": answerer.answers([asked[0], asked[0]], greedy(**warm)),
    }


def test_what_is_drawn_depends_on_the_seed_and_the_prompt_alone() -> None:
    (one,), (two, same) = run_on_ranks(1, drawn_answers), run_on_ranks(2, drawn_answers)
    assert one == two == same
    assert one["together"] == one["alone"] == one["reversed"] != one["another seed"]
    assert one["twice"][0] == one["together"][0] != one["twice"][1]


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).log_softmax(-1)
    draws = KeyedDraws([draw_keys([[5]], 0)[0]], temperature=0.5)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[int(draws(logits[None]))] += 1
    assert torch.allclose(counts / 4000, (logits / 0.5).softmax(-1), atol=0.03)


def ends() -> tuple[list[list[int]], list[list[int]], int]:
    """Answers at the end of a model's positions, and answers that a condition ends; runs on a rank."""
    answerer = answerer_of("gpt2")
    long = [[5] * 128, [6] * 125, [7] * 20]
    with_condition = greedy(ended=lambda answer: len(answer) == 2 + (answer[0] % 2))
    return answerer.answers(long, greedy()), answerer.answers(prompts(), with_condition), answerer.room(long[1], 50)


def test_answers_end_with_the_positions_and_by_a_condition() -> None:
    for at_the_end, conditional, room in run_on_ranks(2, ends):
        assert [len(answer) for answer in at_the_end] == [0, 3, NEW_TOKENS] and room == 3
        assert all(len(answer) == 2 + answer[0] % 2 for answer in conditional)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_smallest_and_the_largest_number_draw_tokens_that_can_be(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **rest: torch.full(shape, number, dtype=torch.float64))
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    assert int(KeyedDraws([0], 1.0)(logits)) == (1 if number == 0 else 2)


def test_sample_answers_stop_at_the_ends_that_the_files_of_a_model_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    run = mock.MagicMock(tokenizer=load_tokenizer("builtin:demo"), config=load([f"run.dir={tmp_path}"]))
    evaluation.answer_questions(run, [Question([3], [4])])
    assert run.answerer.answers.call_args.args[1].stop_ids == {5, 7} | stop_ids(run.tokenizer)
