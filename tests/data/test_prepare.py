from __future__ import annotations

import datetime
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data import encode_rows, tokenized
from lisa_dist.data.encode_rows import DataCounts
from lisa_dist.data.prepare import fingerprint, hash_of_rows, prepare_data, validation_split
from lisa_dist.data.tokenized import tokenize
from lisa_dist.data.tokenizer import load_tokenizer
from tests.support.ranks import run_on_ranks

ROWS = [{"prompt": f"What comes after {i}?", "completion": f"{i + 1}."} for i in range(20)]


def write(file: Path, rows) -> str:
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(file)


def prepare(tmp_path, **options):
    if "path" not in options:
        options["path"] = write(tmp_path / "rows.jsonl", ROWS)
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **options)
    return prepare_data(config, load_tokenizer("builtin:demo"), seed=0)


def rows_of(sequences) -> list[list[int]]:
    return [ids.tolist() for ids in sequences.rows["input_ids"]]


def test_counts(tmp_path):
    data = prepare(tmp_path)
    tokenizer = load_tokenizer("builtin:demo")
    texts = [f"<s><user>{row['prompt']}<assistant>{row['completion']}</s>" for row in ROWS]
    expected = [tokenizer(text).input_ids for text in texts]
    answers = [tokenizer(row["completion"] + "</s>").input_ids for row in ROWS]
    assert rows_of(data.train) == expected
    assert data.counts.tokens == sum(map(len, expected))
    assert data.counts.trained_tokens == sum(map(len, answers))
    assert data.counts.trained_share == pytest.approx(data.counts.trained_tokens / data.counts.tokens)
    assert data.counts.rows == {"read": 20, "used": 20, "cut": 0, "left_out": {}}
    assert data.counts.warnings() == []
    assert data.validation is None
    assert data.format == "prompt_completion"


def test_long_rows_are_cut_and_rows_without_an_answer_dropped(tmp_path):
    whole = prepare(tmp_path)
    prompt = int((whole.train[0].labels != -100).argmax())
    rows = [ROWS[0], {"prompt": ROWS[0]["prompt"] * 3, "completion": "x"}]
    data = prepare(tmp_path, path=write(tmp_path / "long.jsonl", rows), sequence_length=prompt + 1)
    reason = f"without a trained token within data.sequence_length={prompt + 1}"
    assert data.counts.rows == {"read": 2, "used": 1, "cut": 1, "left_out": {reason: 1}}
    assert f"rows: 2 read, 1 used, 1 of them cut, 1 left out (1 {reason})" in data.counts.warnings()
    assert data.train[0].input_ids.tolist() == whole.train[0].input_ids[: prompt + 1].tolist()


def test_nothing_left_to_train(tmp_path):
    with pytest.raises(UserError, match=r"none of 20 rows keeps a trained token within data.sequence_length=4"):
        prepare(tmp_path, sequence_length=4)
    with pytest.raises(UserError, match=r"data.path=.*empty.jsonl: the data set is empty"):
        prepare(tmp_path, path=write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match=r"data.path=null: must name a file"):
        prepare(tmp_path, path=None)
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made stays


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{\n", r"bad.jsonl, line 3: not valid JSON .*data.on_bad_row=skip"),
        ('{"prompt": "q", "completion": null}\n', r"bad.jsonl, line 3: column completion must be text, found nothing"),
    ],
)
def test_bad_rows(tmp_path, broken, message):
    path = write(tmp_path / "bad.jsonl", [*ROWS[:2], broken, *ROWS[2:]])
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, path=path)
    data = prepare(tmp_path, path=path, on_bad_row="skip")
    assert (data.counts.read, data.counts.used, sum(data.counts.left_out.values())) == (21, 20, 1)
    assert next(iter(data.counts.left_out)).startswith("bad: ")
    assert rows_of(data.train) == rows_of(prepare(tmp_path).train)
    assert prepare(tmp_path, path=path, on_bad_row="skip", limit=3).counts.used == 2
    with pytest.raises(UserError, match=r"all 2 rows are bad"):
        prepare(tmp_path, path=write(tmp_path / "worse.jsonl", ["{\n", "{\n"]), on_bad_row="skip")


def test_whoever_may_read_the_cache_may_read_what_is_in_it(tmp_path):
    folder = prepare(tmp_path).hash_file.parent
    (tmp_path / "folder").mkdir()
    assert folder.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_cache_is_used_again_and_follows_what_changes_tokens(tmp_path, monkeypatch):
    first = prepare(tmp_path)
    made = []
    tokenize_into = tokenized._tokenize_into
    monkeypatch.setattr(tokenized, "_tokenize_into", lambda *args: made.append(1) or tokenize_into(*args))
    again = prepare(tmp_path, packing=True, preview=2)  # neither changes a token
    assert not made
    assert again.counts == first.counts
    for change in (
        {"train_on_prompt": True},
        {"sequence_length": 12},
        {"limit": 3},
        {"columns": {"prompt": "completion"}},
    ):
        made.clear()
        assert prepare(tmp_path, **change).counts != first.counts
        assert made == [1]
    path = write(tmp_path / "rows.jsonl", ROWS[::-1])
    assert rows_of(prepare(tmp_path, path=path).train) == rows_of(first.train)[::-1]


def test_cache_that_can_not_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(UserError, match=r"data.cache_dir=.*cache: can't be written"):
        prepare(tmp_path)


def test_fraction_held_out(tmp_path):
    data = prepare(tmp_path, validation="0.25")
    assert (len(data.train), len(data.validation)) == (15, 5)
    everything = rows_of(prepare(tmp_path).train)
    assert sorted(rows_of(data.train) + rows_of(data.validation)) == sorted(everything)
    assert rows_of(prepare(tmp_path, validation="0.25").validation) == rows_of(data.validation)
    with pytest.raises(UserError, match=r"data.validation=0.9: of 2 rows none would be left"):
        prepare(tmp_path, validation="0.9", limit=2)


def test_validation_path_and_split(tmp_path):
    held_out = write(tmp_path / "other.jsonl", ROWS[:3])
    data = prepare(tmp_path, validation=held_out)
    assert (len(data.train), len(data.validation), data.validation_counts.used) == (20, 3, 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "val.jsonl", ROWS[:4])
    assert len(prepare(tmp_path, path=str(folder)).validation) == 4
    assert len(prepare(tmp_path, path=str(folder), validation=held_out).validation) == 3
    (folder / "val.jsonl").rename(folder / "test.jsonl")
    assert prepare(tmp_path, path=str(folder)).validation is None
    assert validation_split(str(folder)) == "test"
    with pytest.raises(UserError, match=r"data.validation=.*nothing.jsonl: no such file"):
        prepare(tmp_path, validation=f"{tmp_path}/nothing.jsonl")
    with pytest.raises(UserError, match=r"data.validation=builtin:dmo: bundled are builtin:demo"):
        prepare(tmp_path, validation="builtin:dmo")


def test_the_hash_of_the_rows_trained_on_is_kept_beside_the_tokens(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("builtin:demo")

    def hashed(**options) -> str:
        return fingerprint(DataConfig(), prepare(tmp_path, **options), tokenizer)["rows"]

    other = write(tmp_path / "other.jsonl", ROWS[::-1])
    options = [{}, {"validation": "0.25"}, {"validation": "0.5"}, {"path": other}, {"limit": 15}]
    found = [hashed(**chosen) for chosen in options]
    assert len(set(found)) == 5
    assert found[1] == hash_of_rows(prepare(tmp_path, validation="0.25").train.rows)
    monkeypatch.setattr("lisa_dist.data.prepare.hash_of_rows", lambda rows: pytest.fail("the rows were read"))
    assert [hashed(**chosen) for chosen in options] == found


def test_packing_fills_sequences(tmp_path):
    data = prepare(tmp_path, packing=True, sequence_length=64)
    assert len(data.train) < 20
    assert data.train.lengths.sum() == data.counts.tokens
    assert data.train.lengths.max() <= 64
    sequence = data.train[0]
    starts = np.flatnonzero(sequence.position_ids == 0)
    assert len(starts) == len(data.train.packing[0]) > 1
    assert (sequence.labels[starts] == -100).all()


def test_fallback_template_comes_with_a_cached_result_too(tmp_path):
    config = DataConfig(path=write(tmp_path / "rows.jsonl", ROWS), cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        tokenizer = load_tokenizer("builtin:demo")
        tokenizer.chat_template = None
        prepare_data(config, tokenizer, seed=0)
        assert "### Response" in tokenizer.chat_template


def prepare_on_rank(folder: str, path: str) -> tuple:
    """What a rank gets: its tokens, or the error's text; and how often it tokenized itself."""
    made = []
    tokenize_into = tokenized._tokenize_into
    tokenized._tokenize_into = lambda *args: made.append(1) or tokenize_into(*args)
    try:
        config = DataConfig(path=path, cache_dir=folder)
        rows = tokenize(config, path, "train", load_tokenizer("builtin:demo"))
        return rows.rows[:]["input_ids"], rows.counts, len(made)
    except UserError as error:
        return str(error), None, len(made)
    finally:
        tokenized._tokenize_into = tokenize_into


def test_one_rank_tokenizes_and_all_agree(tmp_path):
    good = run_on_ranks(2, prepare_on_rank, str(tmp_path / "cache"), write(tmp_path / "rows.jsonl", ROWS))
    assert good[0][:2] == good[1][:2]
    assert len(good[0][0]) == 20
    assert [result[2] for result in good] == [1, 0]
    bad = run_on_ranks(2, prepare_on_rank, str(tmp_path / "cache"), write(tmp_path / "bad.jsonl", ["{\n"]))
    assert "bad.jsonl, line 1: not valid JSON" in bad[0][0]
    assert bad[0][0] == bad[1][0]


def said(caplog) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return texts


def test_what_is_likely_not_meant_is_said_at_every_start(tmp_path, caplog):
    rows = [{**row, "id": i, "note": None, "topic": "x"} for i, row in enumerate(ROWS)]
    rows[3]["completion"] = " "
    rows += [{"prompt": "q", "completion": "a"}] * 2
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # the second time out of the cache
        prepare(tmp_path, path=path)
        assert [text.removeprefix(f"data.path={path}: ") for text in said(caplog)] == [
            "nothing reads columns id, topic",
            "empty answers: 1, of which only the end is trained",
        ]
    prepare(tmp_path, path=write(tmp_path / "long.jsonl", [{"prompt": "word " * 300, "completion": "a"}]))
    assert any("only 0." in text and "of the tokens are trained" in text for text in said(caplog))
    prepare(tmp_path, path=write(tmp_path / "few.jsonl", ROWS[:2]), validation=path)
    assert [text.partition(": ")[0] for text in said(caplog)] == [f"data.validation={path}"] * 2
    prepare(tmp_path, path=path, validation=path)
    assert said(caplog)[-1].startswith(f"data.validation={path}: holds the very rows that are trained on")


TOOL = {"type": "function", "function": {"name": "f", "description": "does f", "parameters": {}}}


def test_what_the_chat_template_leaves_out_is_said_at_every_start(tmp_path, caplog):
    thought = {"role": "assistant", "content": "a", "reasoning_content": "t"}
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "q"}, thought], "tools": [TOOL]}])
    for _ in range(2):
        prepare(tmp_path, path=path)
        assert [text.partition(", so")[0] for text in said(caplog)] == [
            f"data.path={path}: the chat template does not render {name}" for name in ("reasoning_content", "tools")
        ]


def test_nulls_that_are_left_out_of_arguments_and_schemas_are_said(tmp_path, caplog):
    def row(arguments, schema) -> dict:
        call = {"id": None, "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": "a", "name": None, "tool_calls": [call]}
        tool = {"type": None, "function": {"name": "f", "description": "d", "parameters": schema}}
        return {"messages": [{"role": "user", "content": "q"}, answer], "tools": [tool]}

    kept, lost = ({"a": 1}, {"type": "object"}), [({"a": {"b": None}}, {}), ({"a": 1}, {"p": [{"default": None}]})]
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}{{ tools | tojson }}{{ eos_token }}{% endfor %}"
    rows = [row(*kept), row(json.dumps({"a": None}), {}), *(row(*one) for one in lost)]
    config = DataConfig(path=write(tmp_path / "rows.jsonl", rows), cache_dir=str(tmp_path / "cache"))
    assert prepare_data(config, tokenizer, seed=0).counts.with_nulls == 2
    assert [text for text in said(caplog) if "null" in text and "left out of tool calls' arguments" in text]


def test_control_tokens_in_messages_are_said_at_every_start(tmp_path, caplog):
    struck = {
        "messages": [{"role": "user", "content": "is <s>this</s> gone?"}, {"role": "assistant", "content": "yes"}]
    }
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = write(tmp_path / "rows.jsonl", [plain, struck, struck])
    for _ in range(2):  # the second time out of the cache
        assert prepare(tmp_path, path=path).counts.with_control_words == 2
        (told,) = said(caplog)
        assert told.startswith(f"data.path={path}: messages of 2 rows hold </s>, <s>, which the tokenizer takes for")
    path = write(tmp_path / "texts.jsonl", [{"text": "<s>one</s>"}])
    assert prepare(tmp_path, path=path).counts.with_control_words == 0 and said(caplog) == []


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_characters_that_the_tokenizer_does_not_know_are_counted_and_said(tmp_path, caplog, unknown):
    vocabulary = ["</s>", "<unk>", *"ab:\u2581"]
    model = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, [], unk_token=unknown))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    for name, row in (
        ("chat", {"prompt": "a<unk>b", "completion": "a: \u00e9 \u65e5\nb"}),
        ("text", {"text": "\u00e9a\n\u65e5"}),
    ):
        path = write(tmp_path / f"{name}.jsonl", [row])
        config = DataConfig(path=path, cache_dir=str(tmp_path / "cache"))
        assert prepare_data(config, tokenizer, seed=0).counts.unknown_characters == 2
        assert f"data.path={path}: the tokenizer does not know 2 of the characters" in "\n".join(said(caplog))


def test_rows_are_left_out_by_reason(tmp_path):
    rows = [*ROWS[:3], "{\n", {"prompt": "q", "completion": 1}, {"prompt": "q"}, {"prompt": "q", "completion": None}]
    counts = prepare(tmp_path, path=write(tmp_path / "rows.jsonl", rows), on_bad_row="skip").counts
    assert counts.left_out == {"bad: not valid JSON": 1, "bad: column completion must be text": 3}
    counts = DataCounts()
    for number in range(200):
        counts.leave_out(f"reason {number}")
    assert len(counts.left_out) <= 21 and sum(counts.left_out.values()) == 200


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(encode_rows, "ROWS_A_CHUNK", 3)
    monkeypatch.setattr(encode_rows, "CHUNKS_BEFORE_WORKERS", 1)


def test_processes_change_nothing_of_tokens_and_counts(tmp_path, caplog, small_chunks):
    chat = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i}]}
        for i in range(40)
    ]
    chat[13]["topic"] = "x"
    chat[22]["messages"][1]["reasoning_content"] = "t"
    chat[31]["messages"][1]["thinking"] = "t"
    rows: list = [*chat, {"messages": 3}, "{\n", {"messages": chat[1]["messages"][:1]}, {"messages": []}, *chat[:5]]
    path = write(tmp_path / "rows.jsonl", rows[::-1])
    found = []
    for num_proc in ("1", "3"):
        folder = tmp_path / num_proc
        folder.mkdir()
        data = prepare(folder, path=path, on_bad_row="skip", num_proc=num_proc, sequence_length=40)
        found.append((rows_of(data.train), data.counts, said(caplog)))
    assert found[0] == found[1]
    counts, warnings = found[0][1:]
    assert (counts.read, len(counts.left_out), len(counts.not_rendered)) == (49, 3, 2)
    assert counts.cut and counts.empty_answers == 2 and counts.unread_columns == ["topic"]
    assert [text.partition(": ")[0].partition(", ")[2] for text in warnings[:3]] == ["line 6", "line 7", "line 8"]


@pytest.mark.parametrize("num_proc", ["1", "2", "4"])
def test_the_first_bad_row_is_named_whatever_the_processes(num_proc, tmp_path, small_chunks):
    bad = [{"prompt": "q", "completion": 1}, {"prompt": 2, "completion": "a"}]
    path = write(tmp_path / "bad.jsonl", [*ROWS, *ROWS, bad[0], *ROWS[:2], bad[1], "{\n"])
    with pytest.raises(UserError, match=r"bad.jsonl, line 41: column completion must be text"):
        prepare(tmp_path, path=path, num_proc=num_proc)
    path = write(tmp_path / "0.jsonl", [*ROWS, bad[0]])
    (tmp_path / "1.json").write_text("[")
    with pytest.raises(UserError, match=r"0.jsonl, line 21: column completion"):  # not the file behind it
        prepare(tmp_path, path=f"{tmp_path}/[01].json*", num_proc=num_proc)
    with pytest.raises(UserError, match=r"1.json, line 1: not valid JSON"):
        prepare(tmp_path, path=f"{tmp_path}/[01].json*", num_proc=num_proc, on_bad_row="skip")
    assert not list((tmp_path / "cache").iterdir())


def test_a_process_that_is_killed_ends_in_a_sentence(tmp_path, small_chunks, monkeypatch):
    here = os.getpid()
    encode = encode_rows.encode_chunk
    monkeypatch.setattr(
        encode_rows, "encode_chunk", lambda *args: encode(*args) if os.getpid() == here else os._exit(1)
    )
    with pytest.raises(UserError, match=r"data.num_proc=2: while tokenizing a process was killed"):
        prepare(tmp_path, num_proc="2")


def test_subsets_reach_the_validation_split(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    subsets = [{"config_name": name, "data_files": files(name)} for name in ("a", "b")]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n")
    for name, count in (("a", 5), ("b", 6)):
        write(folder / f"{name}.jsonl", ROWS[:count])
        write(folder / f"{name}_held.jsonl", ROWS[: count - 3])
    data = prepare(tmp_path, path=str(folder), subset="b")
    assert (len(data.train), len(data.validation)) == (6, 3)
    other = prepare(tmp_path, path=str(folder / "a.jsonl"), validation=str(folder / "b.jsonl"))
    assert (len(other.train), len(other.validation)) == (5, 6)
    with pytest.raises(UserError, match=r"data.path=.*: has the subsets a, b; choose one with data.subset=NAME"):
        prepare(tmp_path, path=str(folder))


def files(name: str) -> list[dict]:
    return [{"split": "train", "path": f"{name}.jsonl"}, {"split": "validation", "path": f"{name}_held.jsonl"}]


class EveryCallAnotherDay(datetime.date):
    """A clock that passes midnight each time it is looked at."""

    days = itertools.count(1)

    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2024, 1, next(cls.days))


def test_a_template_that_writes_the_day_writes_one_and_says_which(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encode_rows.datetime, "date", EveryCallAnotherDay)
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template

    def days(**options) -> set[str]:
        config = DataConfig(path=write(tmp_path / "rows.jsonl", ROWS), cache_dir=str(tmp_path / "cache"), **options)
        data = prepare_data(config, tokenizer, seed=0)
        assert fingerprint(config, data, tokenizer)["date"] == data.counts.date
        return {tokenizer.decode(ids).partition("<user>")[0].replace("<s>", "").strip() for ids in rows_of(data.train)}

    assert len(first := days()) == 1
    assert days() == first, "of the cache, whatever the day is"
    said = "the chat template writes the day into rows: 2024-01-0"
    assert caplog.text.count(said) == 2 and "data.date=2024-01-0" in caplog.text
    caplog.clear()
    assert days(date="2001-02-03") == {tokenizer.decode(tokenizer("03 Feb 2001").input_ids).strip()} != first
    assert said not in caplog.text
    assert prepare(tmp_path).counts.date is None, "a template that writes none"
    with pytest.raises(UserError, match=r"data.date=31.1.2026: must be a day such as 2026-01-31"):
        DataConfig(date="31.1.2026")


def test_a_full_disk_names_the_cache_and_leaves_nothing_there(tmp_path, monkeypatch):
    open_file = tokenized.pa.OSFile
    monkeypatch.setattr(tokenized.pa, "OSFile", lambda path, mode: open_file("/dev/full", mode))
    with pytest.raises(UserError, match=f"^data.cache_dir={tmp_path}/cache: No space left on device; free space there"):
        prepare(tmp_path)
    assert not list((tmp_path / "cache").iterdir())
