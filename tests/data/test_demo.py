from __future__ import annotations

import json

from transformers import AutoConfig

from lisa_dist.data.demo import make_demo
from lisa_dist.data.tokenizer import load_tokenizer


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (make_demo.DATA / name).read_text().splitlines()]


def test_the_files_are_what_the_script_makes():
    train, validation = make_demo.make_rows()
    assert rows("train.jsonl") == train
    assert rows("validation.jsonl") == validation


def test_held_out_questions_are_new_but_their_answers_can_be_known():
    train, validation = rows("train.jsonl"), rows("validation.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    assert {row["completion"] for row in validation} <= {row["completion"] for row in train}
    assert len({row["prompt"] for row in train}) == len(train)


def test_tokenizer_and_model_fit_together():
    tokenizer = load_tokenizer("builtin:demo")
    config = AutoConfig.from_pretrained(make_demo.MODEL)
    assert len(tokenizer) == config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    )
