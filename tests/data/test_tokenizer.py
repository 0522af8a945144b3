from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lisa_dist.config import UserError
from lisa_dist.config.paths import MODELS
from lisa_dist.data.encode import Encoder
from lisa_dist.data.formats import Conversation
from lisa_dist.data.tokenizer import encode_prompt, ensure_chat_template, load_tokenizer
from tests.support.templates import trained_runs

DEMO = MODELS / "demo"


def test_bundled_and_directory():
    for path in ("builtin:demo", str(DEMO)):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
        assert encode_prompt(tokenizer, "What is an owl?")[0] == tokenizer.bos_token_id


def test_a_long_text_has_no_warning_of_transformers(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "warning", said.append)
    tokenizer = load_tokenizer("builtin:demo")
    assert len(tokenizer("word " * 600).input_ids) > tokenizer.model_max_length
    assert said == []


def test_bare_tokenizer_json(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer("What").input_ids == load_tokenizer("builtin:demo")("What").input_ids


@pytest.mark.parametrize("eos", ["<｜end▁of▁sentence｜>", "<|im_end|>"])
def test_bare_tokenizer_json_with_files_beside_it(tmp_path, eos):
    text = (DEMO / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("</s>", eos).replace("<s>", "<｜begin▁of▁sentence｜>"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<｜begin▁of▁sentence｜>", eos)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<pad>", "pad_token": eos}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<pad>", eos)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<pad>"


@pytest.mark.parametrize(
    ("file", "fields", "named"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": "{{ 'mine' }}"},
            "tokenizer_config.json gives another chat_template ",
        ),
        (
            "special_tokens_map.json",
            {"eos_token": {"content": "<pad>"}},
            "tokenizer_config.json gives another eos_token ",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {}, "eos_token": "<pad>"},
            "special_tokens_map.json gives an",
        ),
        ("tokenizer_config.json", {"padding_side": "left"}, ""),
    ],
)
def test_files_of_a_directory_that_say_different_things_are_told(tmp_path, caplog, file, fields, named):
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = "{{ 'first' }}"
    tokenizer.save_pretrained(tmp_path)  # with the template in a file of its own
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    before = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**before, **fields}))
    assert load_tokenizer(str(tmp_path)).chat_template == "{{ 'first' }}"
    told = [record.getMessage() for record in caplog.records if "gives another" in record.getMessage()]
    assert len(told) == bool(named) and all(f"{tmp_path}: {named}" in message for message in told)


def test_a_template_that_is_a_processors_alone_is_told(tmp_path, caplog):
    tokenizer = load_tokenizer("builtin:demo")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'first' }}"}))
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == tokenizer.chat_template and not caplog.text
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(str(tmp_path)).chat_template is None
    assert f"{tmp_path}: chat_template.json is a processor's and no tokenizer's, so it is passed over" in caplog.text


def test_bare_sentencepiece_model(tmp_path):
    text = (DEMO.parents[1] / "data" / "demo" / "train.jsonl").read_text()
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "model").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "model" / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, character_coverage=0.999, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "model" / "tokenizer.vocab").unlink()
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    assert (len(tokenizer), tokenizer.eos_token) == (400, "</s>")
    assert tokenizer.decode(tokenizer("What is naïve 😀?").input_ids, skip_special_tokens=True) == "What is naïve 😀?"
    assert tokenizer("one").input_ids[0] == tokenizer.bos_token_id
    assert ensure_chat_template(tokenizer)
    assert encode_prompt(tokenizer, "one")[0] == tokenizer.bos_token_id
    answers = ["naïve 😀 one.", "two"]
    messages = [{"role": role, "content": text} for text in answers for role in ("user", "assistant")]
    encoded = Encoder(tokenizer, 512).encode(Conversation(messages))
    runs = trained_runs(tokenizer, encoded.input_ids.tolist(), encoded.labels.tolist())
    assert runs == [answer + "</s>" for answer in answers]


@pytest.mark.parametrize(
    ("name", "single_digits", "followed"),
    [
        ("GPT2Tokenizer", True, False),  # as SmolLM2's
        ("GPT2Tokenizer", False, True),
        ("Qwen2Tokenizer", False, False),
        ("PreTrainedTokenizerFast", True, True),
    ],
)
def test_texts_are_split_as_tokenizer_json_says_whatever_its_class(tmp_path, name, single_digits, followed, caplog):
    """Classes of transformers put a splitting of their own in the place of the file's."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    model.train_from_iterator(["2024 2024 1999 on on"] * 9, trainer)
    if single_digits:
        model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), model.pre_tokenizer])
    model.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("in 2024, on 1999").input_ids == model.encode("in 2024, on 1999").ids
    assert tokenizer.eos_token == "<|endoftext|>"
    assert ("other tokens of a text than tokenizer.json" in caplog.text) != followed
    if name == "GPT2Tokenizer" and followed:  # carries out what its configuration says of a blank
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": True}))
        assert load_tokenizer(str(tmp_path))("on").input_ids == model.encode(" on").ids
        assert "other tokens" not in caplog.text


def test_no_eos_token(tmp_path):
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"model.tokenizer=.* has no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:dmo", "model.tokenizer=builtin:dmo: bundled are builtin:demo"),
        (str(DEMO.with_name("demos")), f"no such directory; did you mean {DEMO}?"),
        (str(DEMO / "config.json"), "must be a directory or a hub id, not a file; did you mean"),
        (str(Path(__file__).parent), "no tokenizer"),
    ],
)
def test_paths_without_a_tokenizer(path, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_git_lfs_has_not_fetched_are_named(tmp_path, name):
    shutil.copytree(MODELS / "demo", tmp_path, dirs_exist_ok=True)
    load_tokenizer(str(tmp_path))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer .*git lfs pull"):
        load_tokenizer(str(tmp_path))
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"{name} is empty"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_takes_control_tokens_apart_has_no_chat_template(tmp_path):
    shutil.copytree(MODELS / "demo", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "split_special_tokens": True}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("</s>", add_special_tokens=False).input_ids != [tokenizer.eos_token_id]
    for use in (ensure_chat_template, lambda tokenizer: encode_prompt(tokenizer, "q")):
        with pytest.raises(UserError, match=f"model.tokenizer={tmp_path}: split_special_tokens .* must be false"):
            use(tokenizer)
