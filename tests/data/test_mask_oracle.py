"""What is trained, against the marks that trl put into its training templates (``{% generation %}``)."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.encode import Encoder
from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.tokenizer import load_tokenizer, render
from tests.support.conversations import CONVERSATIONS, in_parts
from tests.support.templates import trained_runs

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(file.stem.removesuffix("_training") for file in FOLDER.glob("*_training.jinja"))
IN_PARTS = {"idefics3", "smolvlm", "llava_next"}  # templates that want contents as lists of parts

# Marked there, not trained here, because no model is asked for more once its turn has ended:
# the line break that follows the token that ends a turn,
LINE_BREAK = {
    *("diffusion_gemma", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_5_nothink"),
    *("qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
}
# and the end of the text, which these write after the last turn's own <|end|>.
END_OF_TEXT = {"phi3", "phi3_5"}

CALLS = {name for name, known in CONVERSATIONS.items() if any("tool_calls" in m for m in known.messages)}
BARE_CALLS = {"tools, a call at the end", "tools, arguments as JSON text"}
# Rendered there with a part of the row missing, refused here.
REFUSED = {
    **dict.fromkeys(["deepseek_r1_distill", "idefics3", "lfm2", "llama3", "qwen2_5_vl", "smolvlm"], CALLS),
    **dict.fromkeys(["phi3", "phi3_5"], CALLS),
    # where a tool's result follows, these refuse it themselves
    **dict.fromkeys(["cohere", "cohere2", "gemma", "gemma3", "llava_next"], BARE_CALLS),
    "gptoss": {"tools, parallel calls"},  # it writes the first of them alone
    # The second call comes right after the first one's result, without the token that ends the prompt for it.
    "deepseekv3": {"tools, two calls in a row"},
    # It writes the words that stood before the call after the call's result.
    "diffusion_gemma": {"tools, words and a call"},
}

OSLO, ROME = (f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>}}<tool_call|>' for city in ("Oslo", "Rome"))
# <|tool_response> is what this family's models stop by after a call; it begins the result, so it is not marked. After a
# result the prompt has no header, while the whole has one, so it is for the model to write.
OTHER_RUNS = {
    ("diffusion_gemma", "tools, a call at the end"): [f"{OSLO}<|tool_response>"],
    ("diffusion_gemma", "tools, a result and two answers"): [
        *(f"{OSLO}<|tool_response>", "<|turn>model\nRain.<turn|>"),
        *(f"{ROME}<|tool_response>", "<|turn>model\nSun.<turn|>"),
    ],
    ("diffusion_gemma", "tools, two calls in a row"): [
        *(f"{OSLO}<|tool_response>", f"<|turn>model\n{OSLO}<|tool_response>", "<|turn>model\nRain.<turn|>"),
    ],
    ("diffusion_gemma", "tools, parallel calls"): [
        *(f"{OSLO}{ROME}<|tool_response>", "<|turn>model\nRain and sun.<turn|>"),
    ],
    ("diffusion_gemma", "tools, thoughts before calls"): [
        *(f"{OSLO}<|tool_response>", "<|turn>model\nRain.<turn|>", "Yes.<turn|>"),
    ],
}

TOKEN = r"<[|｜][^<>{}' ]+[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|<end_of_utterance>|\[gMASK\]|<sop>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """One tokenizer with the special tokens of every template, and thoughts and calls as tokens of their own."""
    shared = load_tokenizer("builtin:demo")
    sources = [(FOLDER / f"{name}_training.jinja").read_text() for name in TEMPLATES]
    special = sorted({token for source in sources for token in re.findall(TOKEN, source)})
    shared.add_special_tokens({"additional_special_tokens": special})
    shared.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    shared.model_max_length = 100_000
    return shared


def opening_of(tokenizer: PreTrainedTokenizerBase, parts: bool) -> str:
    """Return what the template writes for a prompt alone, to open an answer."""
    question = Conversation([{"role": "user", "content": "q"}])
    messages = (in_parts(question) if parts else question).messages
    prompt, alone = render(tokenizer, messages, prompt=True), render(tokenizer, messages)
    same = next((n for n, pair in enumerate(zip(prompt, alone)) if pair[0] != pair[1]), len(alone))
    return prompt[prompt.rfind("<", 0, same + 1) if same < len(alone) else same :]


def marked_spans(text: str, spans: list[tuple[int, int]], openings: list[str]) -> list[tuple[int, int]]:
    """Return the spans less what a prompt holds of them, where they begin with an opening or within one.

    Only whole tokens of an opening are taken off, so an answer that begins like one keeps its first character.
    """
    left = []
    for start, end in spans:
        begin = start
        for opening in openings:
            before = next(n for n in range(len(opening), -1, -1) if text[:start].endswith(opening[:n]))
            for piece in re.findall(rf"{TOKEN}|</?think>|.|\n", opening[before:]):
                if not text.startswith(piece, begin):
                    break
                begin += len(piece)
        left.append((begin, end))
    return left


def marks_of_trl(tokenizer: PreTrainedTokenizerBase, name: str, conversation: Conversation) -> list[int]:
    """Return labels by trl's marks, less the tokens of the prompts and those that this project leaves out by intent."""
    encoded = tokenizer.apply_chat_template(
        copy.deepcopy(conversation.messages),
        tools=conversation.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    text = render(tokenizer, conversation.messages, tools=conversation.tools)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    starts = [n for n, mark in enumerate(mask) if mark and (n == 0 or not mask[n - 1])]
    stops = [n for n, mark in enumerate(mask, start=1) if mark and (n == len(mask) or not mask[n])]
    spans = [(offsets[start][0], offsets[stop - 1][1]) for start, stop in zip(starts, stops)]
    openings = [opening_of(tokenizer, name in IN_PARTS)]
    if name.startswith("deepseek"):
        openings.append("<｜tool▁outputs▁end｜>")  # what opens the answer to a tool's result
    spans = marked_spans(text, spans, openings)
    if name in END_OF_TEXT:
        spans = [(start, end - len("</s>") * text[start:end].endswith("\n</s>")) for start, end in spans]
    if name in LINE_BREAK:
        spans = [(start, end - text[start:end].endswith("\n")) for start, end in spans]
    return [
        token if any(first < end and last > start for start, end in spans) else -100
        for token, (first, last) in zip(ids, offsets)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_trl_marks(name, tokenizer):
    tokenizer.chat_template = (FOLDER / f"{name}_training.jinja").read_text()
    encoder = Encoder(tokenizer, 100_000)
    compared = 0
    for kind, known in CONVERSATIONS.items():
        conversation = in_parts(known) if name in IN_PARTS else known
        try:
            marks = marks_of_trl(tokenizer, name, conversation)
        except (TemplateError, TypeError) as error:
            with pytest.raises(BadRowError, match="the chat template refuses the messages"):
                encoder.encode(conversation)
            assert kind not in REFUSED.get(name, {}), error
            continue
        if kind in REFUSED.get(name, {}):
            with pytest.raises(BadRowError, match=r"leaves out|renders what comes before|inside"):
                encoder.encode(conversation)
            continue
        encoded = encoder.encode(conversation)
        ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
        ours, theirs = trained_runs(tokenizer, ids, labels), trained_runs(tokenizer, ids, marks)
        expected = OTHER_RUNS.get((name, kind), theirs)
        assert ours == expected, kind
        assert (ours != theirs) == ((name, kind) in OTHER_RUNS), kind
        if expected is theirs:
            assert labels == marks, kind
        compared += 1
    assert compared >= 16


@pytest.mark.parametrize("name", sorted(LINE_BREAK | END_OF_TEXT))
def test_what_trl_marks_beyond_the_end_is_there(name, tokenizer, monkeypatch):
    tokenizer.chat_template = (FOLDER / f"{name}_training.jinja").read_text()
    known = CONVERSATIONS["one turn"]
    conversation = in_parts(known) if name in IN_PARTS else known
    labels = Encoder(tokenizer, 100_000).encode(conversation).labels.tolist()
    for exceptions, beyond in ((LINE_BREAK, 1), (END_OF_TEXT, 1)):
        if name in exceptions:
            with monkeypatch.context() as patch:
                patch.setattr(f"{__name__}.{'LINE_BREAK' if exceptions is LINE_BREAK else 'END_OF_TEXT'}", set())
                marks = marks_of_trl(tokenizer, name, conversation)
            assert sum(mark != label for mark, label in zip(marks, labels)) >= beyond


@pytest.mark.parametrize("kind", ["several turns", "<think> in the content", "tools, parallel calls"])
def test_a_cut_in_an_answer_or_a_question_leaves_the_rest_as_it_was(kind, tokenizer):
    tokenizer.chat_template = (FOLDER / "qwen3_training.jinja").read_text()
    whole = Encoder(tokenizer, 100_000).encode(CONVERSATIONS[kind])
    for length in range(1, len(whole.labels), 7):
        cut = Encoder(tokenizer, length).encode(CONVERSATIONS[kind])
        assert cut.cut
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.labels.tolist() == whole.labels[:length].tolist()
