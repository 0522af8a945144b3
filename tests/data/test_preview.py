from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data import preview
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.preview import marked_text, sample_questions, show_preview
from lisa_dist.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    tokenizer = load_tokenizer("builtin:demo")
    cache = tmp_path_factory.mktemp("cache")
    return tokenizer, prepare_data(DataConfig(path="builtin:demo", cache_dir=str(cache)), tokenizer, seed=0)


def shown(demo, colour=False, **options) -> str:
    tokenizer, data = demo
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="standard" if colour else None)
    show_preview(DataConfig(**options), data, tokenizer, console)
    return out.getvalue()


def test_samples_and_share_are_shown(demo):
    text = shown(demo, preview=2)
    first = demo[1].train[0]
    trained = int((first.labels != -100).sum())
    assert f"sample 1: {trained} of {len(first.labels)} tokens trained" in text
    assert "sample 2" in text
    assert "sample 3" not in text
    assert f"trained: {demo[1].counts.trained_share:.1%} of" in text
    question, answer = demo[0].decode(first.input_ids).split("<assistant>")
    assert f"{question}<assistant>⟦{answer}⟧" in text


def test_trained_tokens_are_coloured(demo):
    answer = demo[0].decode(demo[1].train[0].input_ids).split("<assistant>")[1]
    text = shown(demo, colour=True, preview=1)
    assert f"\x1b[1;32m{answer}\x1b[0m" in text
    assert "⟦" not in text


def test_nothing_unless_asked_and_only_on_rank_zero(demo, monkeypatch, tmp_path):
    assert shown(demo) == ""
    monkeypatch.setattr(preview, "is_main", lambda: False)
    assert shown(demo, preview=1, preview_file=str(tmp_path / "no.json")) == ""
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(("count", "expected"), [(None, 3), (5, 5)])
def test_file(demo, tmp_path, count, expected):
    file = tmp_path / "new" / "preview.json"
    shown(demo, preview=count, preview_file=str(file))
    rows = json.loads(file.read_text())
    assert len(rows) == expected
    for row, sequence in zip(rows, (demo[1].train[index] for index in range(expected)), strict=True):
        assert row == {"input_ids": sequence.input_ids.tolist(), "labels": sequence.labels.tolist()}
    shown(demo, preview=count, preview_file=str(file))  # its own may be written anew
    (tmp_path / "rows.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match=r"data.preview_file=.*rows.json: holds something else"):
        shown(demo, preview_file=str(tmp_path / "rows.json"))
    assert (tmp_path / "rows.json").read_text() == '[{"prompt": "a"}]'
    with pytest.raises(UserError, match=r"data.preview_file=.*: can't be written"):
        shown(demo, preview_file=str(file / "x"))


def test_marked_text_keeps_split_characters_whole(demo):
    tokenizer, _ = demo
    ids = tokenizer("a é😀 b").input_ids
    labels = [-100, *ids[1:-1], -100]
    text = marked_text(tokenizer, ids, labels, brackets=True).plain
    assert text.replace("⟦", "").replace("⟧", "") == "a é😀 b"
    assert text.count("⟦") == 1


def test_questions_end_where_the_answer_begins(demo):
    tokenizer, data = demo
    questions = sample_questions(data.validation, 3)
    assert len({tuple(question.prompt_ids) for question in questions}) == 3
    for question in questions:
        assert tokenizer.decode(question.prompt_ids).endswith("<assistant>")
        assert tokenizer.decode(question.answer_ids).endswith("</s>")
