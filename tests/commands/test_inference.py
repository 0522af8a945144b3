"""``evaluate`` and ``generate`` on a run and on its export: the numbers of training, the answers of transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_dist.commands import chat, evaluate, export, generate
from lisa_dist.commands.inference import OpenedModel, answer_ends, without_training
from lisa_dist.config import UserError
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.loading import load, load_run
from lisa_dist.config.prompts import read_prompts
from lisa_dist.data.prepare import fingerprint, prepare_data
from lisa_dist.data.stops import stop_ids
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.runtime import distributed
from lisa_dist.training.generation import AnswerSettings
from lisa_dist.training.loop import train
from tests.support.families import tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.templates import FAMILIES, NO_END, TEMPLATES, Template, tokenizer_with

QUESTIONS = ["sort 3 1 2", "Who are you?"]


def train_and_export(run_dir: str, target: str, cache: str) -> None:
    """Two steps of the demonstration in fp32 arithmetic, exported. Runs on a rank."""
    overrides = [f"run.dir={run_dir}", "train.max_steps=2", "train.eval_every=2", "train.sample_prompts=0"]
    overrides += ["data.sequence_length=48", "train.global_batch_size=8", f"data.cache_dir={cache}"]
    overrides.append("precision.compute=float32")
    assert train(load([*overrides, "parallel.cpu_threads=1"])) == 0
    assert export.run(load_run(run_dir, [f"export.path={target}", "export.dtype=float32"])) == 0


def printed_by(command: Any, run_dir: str | None, overrides: list[str]) -> str:
    """What a command prints. Runs on a rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        config = load(overrides) if run_dir is None else load_run(run_dir, overrides)
        assert command(config) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inference")
    run_dir, target = folder / "run", folder / "exported"
    run_on_ranks(1, train_and_export, str(run_dir), str(target), str(folder / "cache"))
    return run_dir, target


def test_evaluate_finds_the_loss_of_the_training_run(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, target = trained
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expected = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    run_on_ranks(1, printed_by, evaluate.run, str(run_dir), [])
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6) and found["step"] == 2
    assert found["perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    elsewhere = [f"evaluate.path={target}", f"evaluate.output={tmp_path / 'exported.json'}"]
    printed = run_on_ranks(2, printed_by, evaluate.run, str(run_dir), [*elsewhere, "evaluate.limit=5"])
    found = json.loads((tmp_path / "exported.json").read_text())
    assert (found["model"], found["step"], found["sequences"]) == (str(target), None, 5)
    assert found["eval_loss"] != pytest.approx(expected, rel=1e-6), "five rows are not all rows"
    assert f"loss {found['eval_loss']:.4f}" in printed[0] and printed[1] == ""


def test_generate_answers_as_transformers_does(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, target = trained
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    expected = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    length = ["generate.max_new_tokens=8", "precision.compute=float32"]
    prompts = tmp_path / "prompts.jsonl"
    messages = {"messages": [{"role": "user", "content": QUESTIONS[1]}]}
    prompts.write_text(f"{json.dumps({'prompt': QUESTIONS[0]})}\n{json.dumps(messages)}\n")
    (printed,) = run_on_ranks(1, printed_by, generate.run, str(run_dir), [*length, f"generate.prompts={prompts}"])
    assert printed.splitlines() == expected
    output = tmp_path / "new" / "answers.jsonl"
    more = [f"generate.path={target}", f"generate.prompts={QUESTIONS}", f"generate.output={output}"]
    assert run_on_ranks(2, printed_by, generate.run, None, [*length, *more, "parallel.cpu_threads=1"]) == ["", ""]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["answer"] for row in rows] == expected and [row["prompt"] for row in rows] == QUESTIONS
    (told,) = run_on_ranks(1, refusal, generate.run, None, [*length, *more])
    assert told == f"generate.output={output}: is there already and is not written over, name a new file"


def test_what_is_asked_again_is_drawn_anew_however_many_are_answered_at_once(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    keys = [f"generate.path={trained[1]}", f"generate.prompts={QUESTIONS[:1] * 6}", "generate.temperature=1"]
    keys += ["generate.max_new_tokens=8", "precision.compute=float32", "parallel.cpu_threads=1"]
    answers = []
    for size in (1, 6):
        output = tmp_path / f"{size}.jsonl"
        more = [f"generate.batch_size={size}", f"generate.output={output}"]
        run_on_ranks(1, printed_by, generate.run, None, [*keys, *more])
        answers.append([json.loads(line)["answer"] for line in output.read_text().splitlines()])
    assert answers[0] == answers[1] and len(set(answers[0])) == 6


def conversation(said: list[str], overrides: list[str]) -> tuple[str, str]:
    """What a chat prints, on stdout and stderr, where ``said`` is typed. Runs on a rank."""
    errors, lines = io.StringIO(), iter(said)

    def type_next(ask: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with contextlib.redirect_stderr(errors), mock.patch("builtins.input", type_next):
        printed = printed_by(chat.run, None, overrides)
    return printed, errors.getvalue()


def test_chat_answers_with_what_was_said_before(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, target = trained
    keys = [f"generate.path={target}", "generate.max_new_tokens=6", "precision.compute=float32"]
    keys += ["generate.system=Be brief.", "parallel.cpu_threads=1"]
    said = [QUESTIONS[0], " ", QUESTIONS[1], "/new", QUESTIONS[1], "/end", "never asked"]
    (printed, told), other = run_on_ranks(2, conversation, said, keys)
    assert other[0] == "" and "/new begins another conversation" in told and "A new conversation." in told
    answers = printed.splitlines()
    assert len(answers) == 3
    system, first, second = ({"role": "system", "content": "Be brief."}, *map(as_user, QUESTIONS))
    between = {"role": "assistant", "content": answers[0].strip()}
    asked = tmp_path / "asked.jsonl"
    texts = [[system, first], [system, first, between, second], [system, second]]
    asked.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in texts))
    (alone,) = run_on_ranks(1, printed_by, generate.run, None, [*keys, f"generate.prompts={asked}"])
    assert [answer.strip() for answer in answers] == alone.splitlines()


def conversation_that_is_refused(said: list[str], overrides: list[str]) -> tuple[str, str]:
    """As :func:`conversation`, of a template that refuses the word "no". Runs on a rank."""
    original = chat.prompt_ids

    def prompt_ids(tokenizer: Any, prompt: Any, system: str | None) -> list[int]:
        if prompt[-1] == as_user("no"):
            raise UserError("the chat template refuses it")
        return original(tokenizer, prompt, system)

    with mock.patch.object(chat, "prompt_ids", prompt_ids):
        return conversation(said, overrides)


def test_chat_goes_on_after_what_the_template_refuses(trained: tuple[Path, Path]) -> None:
    keys = [f"generate.path={trained[1]}", "generate.max_new_tokens=2", "parallel.cpu_threads=1"]
    ((printed, told),) = run_on_ranks(1, conversation_that_is_refused, ["no", QUESTIONS[0]], keys)
    assert "the chat template refuses it" in told and len(printed.splitlines()) == 1


def as_user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def refusal(command: Any, run_dir: str | None, keys: list[str]) -> str:
    """What the user is told. Runs on a rank."""
    with pytest.raises(UserError) as caught:
        printed_by(command, run_dir, keys)
    return str(caught.value)


def test_a_step_that_was_not_saved_is_refused(trained: tuple[Path, Path]) -> None:
    (told,) = run_on_ranks(1, refusal, evaluate.run, str(trained[0]), ["evaluate.step=7"])
    assert told.startswith("evaluate.step=7") and "it has 2" in told


def refused_before_opening(output: str, run_dir: str) -> str:
    """What the user is told before a model is opened. Runs on a rank."""
    with mock.patch.object(evaluate, "open_model", side_effect=AssertionError):
        return refusal(evaluate.run, run_dir, [f"evaluate.output={output}"])


def test_a_folder_for_results_that_can_not_be_made_is_told_first(trained: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (told,) = run_on_ranks(1, refused_before_opening, f"{tmp_path}/file/results.json", str(trained[0]))
    assert told == f"evaluate.output={tmp_path}/file/results.json: can't be written, File exists"


def test_results_that_can_not_be_written_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    config = load([f"evaluate.output={tmp_path}/file/results.json"])
    with pytest.raises(UserError, match=r"evaluate\.output=.*can't be written"):
        evaluate._write(config, {"eval_loss": 1.25, "perplexity": 3.5, "data": "rows"})
    assert capsys.readouterr().out == "loss 1.2500, perplexity 3.50 on rows\n"


def test_what_only_training_needs_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["optimizer=adamw8bit", "logger=tensorboard"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs"):
        check_combinations(config)
    check_combinations(without_training(config, None))


def test_prompts_are_a_list_or_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert read_prompts(["a", 2]) == ["a", "2"]
    assert read_prompts(str(file)) == ["one", "two"]
    file.write_bytes("\ufeffone\r\ntwo\r\n".encode())  # as editors on Windows write it
    assert read_prompts(str(file)) == ["one", "two"]
    (tmp_path / "lines.jsonl").write_text('{"prompt": null, "messages": [{"role": "user"}]}\n{"prompt": "a\u2028b"}\n')
    assert read_prompts(str(tmp_path / "lines.jsonl")) == [[{"role": "user"}], "a\u2028b"]
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\n{"question": "y"}\n')
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for name, row in {
        "tools": chat | {"tools": [{"name": "search"}]},
        "system": {"prompt": "a", "system": "Be brief."},
        "answered": {"messages": [*chat["messages"], {"role": "assistant", "content": "b"}]},
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    for wrong, message in (
        ([], "holds no prompt"),
        (["a", chat["messages"]], "is no text; conversations go into a file"),
        ([None], "None is no text"),
        (["a", True], "true is read as no text; put it in quotes"),
        (str(tmp_path / "tools.jsonl"), "line 1 has tools, which would not be asked with"),
        (str(tmp_path / "system.jsonl"), "line 1 has system, which would not be asked with"),
        (str(tmp_path / "answered.jsonl"), "line 1 ends with an answer"),
        (["a", " "], "prompt 2 of 2 is empty"),
        ("nowhere.txt", "file that exists"),
        (None, "file that exists"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(wrong)
    with pytest.raises(UserError, match="line 2 must be an object"):
        read_prompts(str(tmp_path / "broken.jsonl"))


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        (TEMPLATES["chatml"], "<|im_end|>"),
        (FAMILIES["two tokens at the end"], "<|end_turn|>"),
        (FAMILIES["always opened"], "<|eot|>"),
        (NO_END, "<|user|>"),
        (TEMPLATES["instructions"], "</s>"),
    ],
)
def test_answers_stop_at_what_ends_them_in_training(template: Template, stop: str) -> None:
    tokenizer = tokenizer_with(template)
    assert stop_ids(tokenizer) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop)}


@pytest.mark.parametrize(
    ("fields", "file", "ends"),
    [
        ({"eos_token_id": [7, 9]}, None, {2, 7, 9}),
        ({"eos_token_id": 9}, {"eos_token_id": [5, 7]}, {2, 5, 7}),
        ({"eos_token_id": 9}, {}, {2}),
    ],
)
def test_answers_stop_at_the_ends_that_the_files_of_a_model_name(
    fields: dict[str, Any], file: dict[str, Any] | None, ends: set[int], tmp_path: Path
) -> None:
    opened = opened_with(fields, file, tmp_path)
    assert answer_ends(load([]), opened, str(tmp_path)) == ends | stop_ids(opened.tokenizer)


def opened_with(fields: dict[str, Any], file: dict[str, Any] | None, folder: Path) -> Any:
    """A tiny model without weights, of these fields of config.json, and with such a generation_config.json."""
    if file is not None:
        (folder / "generation_config.json").write_text(json.dumps(file))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", **fields))
    store = SimpleNamespace(module=model)
    return SimpleNamespace(tokenizer=load_tokenizer("builtin:demo"), train_module=SimpleNamespace(store=store))


def test_what_the_files_of_a_model_ask_of_answers_and_do_not_get_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"repetition_penalty": 1.05, "suppress_tokens": [], "num_beams": 1, "do_sample": True, "top_p": 0.8}
    opened = opened_with({}, settings, tmp_path)
    told = {}
    for temperature in (0, 0.7):
        caplog.clear()
        answer_ends(load([f"generate.temperature={temperature}"]), opened, str(tmp_path))
        told[temperature] = [record.getMessage().partition("settings have ")[2] for record in caplog.records]
    assert [text.partition(", which")[0] for text in told[0] + told[0.7]] == [
        "repetition_penalty=1.05",
        "repetition_penalty=1.05, top_p=0.8",
    ]
    caplog.clear()
    answer_ends(load([]), opened_with({}, {"eos_token_id": 5, "num_beams": 1}, tmp_path), str(tmp_path))
    assert not caplog.records


def test_what_a_run_says_of_its_model_is_not_said_of_another() -> None:
    keys = ["model.tokenizer=builtin:demo", "model.blocks=model.layers", "model.quantization=int8", "method=lora"]
    found = without_training(load(keys), "other").model
    assert (found.tokenizer, found.blocks, found.quantization) == ("builtin:demo", "model.layers", "int8"), "is set"
    found = without_training(load([*keys, "run.dir=run"]), "other").model
    assert (found.path, found.tokenizer, found.blocks, found.quantization) == ("other", None, None, "none")


def test_messages_that_the_template_refuses_are_named() -> None:
    tokenizer = tokenizer_with(TEMPLATES["model_turns"])
    with pytest.raises(UserError, match=r"generate.prompts: the chat template refuses .*no system role"):
        generate.prompt_ids(tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])


def test_messages_that_the_template_leaves_out_are_named() -> None:
    tokenizer = tokenizer_with(TEMPLATES["instructions"])  # which knows no system prompt, and does not say so
    asked = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UserError, match=r"generate.prompts: the chat template leaves out message 1 of 2 \(system\)"):
        generate.prompt_ids(tokenizer, "Hi", system="Be brief.")
    with pytest.raises(UserError, match=r"leaves out message 3 of 4 \(tool\)"):
        generate.prompt_ids(
            tokenizer, [*asked, {"role": "assistant", "content": "?"}, {"role": "tool", "content": "7"}, *asked]
        )
    chatml = tokenizer_with(TEMPLATES["chatml"])  # whose own system prompt changes nothing
    assert generate.prompt_ids(chatml, "Hi", system="Be helpful.") == generate.prompt_ids(chatml, "Hi")
    assert generate.prompt_ids(tokenizer, asked * 2) != generate.prompt_ids(tokenizer, asked)


def test_a_prompt_ends_without_the_eos_that_a_tokenizer_puts_behind_every_text() -> None:
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = None
    plain, eos = tokenizer("Hello").input_ids, tokenizer.eos_token_id
    assert plain[-1] != eos
    said = tokenizer(f"Hello{tokenizer.eos_token}").input_ids
    assert generate.prompt_ids(tokenizer, f"Hello{tokenizer.eos_token}") == said
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A END", special_tokens=[("END", eos)])
    assert tokenizer("Hello").input_ids == [*plain, eos]
    assert generate.prompt_ids(tokenizer, "Hello") == plain


def test_what_is_wrong_with_the_data_is_said_under_their_key(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    opened: Any = SimpleNamespace(tokenizer=load_tokenizer("builtin:demo"))
    for path in ("builtin:dmo", f"{tmp_path}/nowhere.jsonl", f"{tmp_path}/empty.jsonl"):
        with pytest.raises(UserError, match=f"^evaluate.data={path}: "):
            evaluate.held_out_sequences(load([f"evaluate.data={path}", f"data.cache_dir={tmp_path}"]), opened)


def test_rows_that_were_not_held_out_in_training_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, said = tmp_path / "rows.jsonl", "may be among those held out"
    keys = [f"data.path={file}", "data.validation=0.2", f"data.cache_dir={tmp_path}/cache"]
    file.write_text("".join(json.dumps({"text": f"row {row}"}) + "\n" for row in range(10)))
    tokenizer, config = load_tokenizer("builtin:demo"), load(keys)
    rows = fingerprint(config.data, prepare_data(config.data, tokenizer, 0), tokenizer)
    (tmp_path / "state.json").write_text(json.dumps({"progress": {"data": rows}}))
    opened: Any = SimpleNamespace(tokenizer=tokenizer, source=str(tmp_path), step=4)
    evaluate.held_out_sequences(config, opened)
    assert said not in caplog.text
    with file.open("a") as appended:
        appended.write('{"text": "another row"}\n')
    evaluate.held_out_sequences(config, opened)
    assert said in caplog.text


def stub(tokenizer: Any, known: int) -> OpenedModel:
    """An opened model that knows so many tokens, and has no weights."""
    module = SimpleNamespace(config=SimpleNamespace(vocab_size=known))
    train_module: Any = SimpleNamespace(store=SimpleNamespace(module=module), objective=None, dims=None)
    return OpenedModel(train_module, tokenizer, "stub", None)


class StubAnswerer:
    """Keeps what it is asked, and has no answer."""

    asked: list[list[int]]

    def __init__(self, train_module: Any) -> None:
        self.dims = SimpleNamespace(data_ranks=1)

    def room(self, ids: list[int], most: int) -> int:
        return 1

    def answers(self, asked: list[list[int]], *settings: Any) -> list[list[int]]:
        StubAnswerer.asked = asked
        return [[] for _ in asked]

    def stream(self, *asked: Any) -> list[int]:
        pytest.fail("was asked")


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Any:
    tokenizer = load_tokenizer("builtin:demo")
    known = 1 + max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    monkeypatch.setattr(distributed, "initialize", lambda parallel: None)  # there is no model to be sharded
    for command in (generate, chat):
        monkeypatch.setattr(command, "setup_logging", lambda: None)
        monkeypatch.setattr(command, "open_model", lambda *_: stub(tokenizer, known))
        monkeypatch.setattr(command, "Answerer", StubAnswerer)
        monkeypatch.setattr(command, "settings_of", lambda *_: AnswerSettings(frozenset(), 1))
    return tokenizer, known


def test_tokens_that_the_model_has_no_place_for_are_refused_in_what_it_is_asked(
    stubbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, known = stubbed
    with pytest.raises(UserError, match=rf"generate.prompts: prompt 2 of 2 holds the token <image_s.*number {known}"):
        generate.run(load(["generate.prompts=[one,'<image_soft_token>']"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("an <image_soft_token>\n"))
    assert chat.run(load([])) == 0
    assert "chat: what is said holds the token <image_soft_token>" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "an <image_soft_token>"}))
    keys = [f"evaluate.data={tmp_path}/rows.jsonl", f"data.cache_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"^evaluate.data=.*rows.jsonl: a row holds the token <image_soft_token>"):
        evaluate.held_out_loss(load(keys), stub(tokenizer, known))


def test_messages_of_prompts_are_read_as_those_of_training_data(stubbed: Any, tmp_path: Path) -> None:
    tokenizer, _ = stubbed
    rows = [[{"role": "Human", "content": "Hi"}], [{"role": "USER", "content": [{"type": "text", "text": "Hi"}]}]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    assert generate.run(load([f"generate.prompts={file}"])) == 0
    assert StubAnswerer.asked == [generate.prompt_ids(tokenizer, "Hi")] * 2
    for message, told in (({"role": "gpt", "content": "b"}, "ends with an answer .role gpt"), ({}, "must have a role")):
        with pytest.raises(UserError, match=told):
            generate.as_in_training([*rows[0], message])


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>", "four"),
        ("<|channel|>analysis<|message|>cut off", ""),
        ("four<|return|>", "four"),
    ],
)
def test_thoughts_of_gpt_oss_do_not_go_into_the_history_of_a_chat(answer: str, kept: str) -> None:
    tokenizer = load_tokenizer("builtin:demo")
    special = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer.add_tokens(special, special_tokens=True)
    assert not set(special) & set(tokenizer.all_special_tokens), "as in its tokenizer_config.json, which lists none"
    ids = tokenizer(answer, add_special_tokens=False).input_ids
    assert chat.spoken(ids, tokenizer) == kept
