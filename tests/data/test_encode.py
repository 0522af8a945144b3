from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from lisa_dist.data.encode import Encoder
from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.spans import AnswerFinder
from lisa_dist.data.tokenizer import encode_prompt, ensure_chat_template, load_tokenizer, render
from tests.support.templates import TEMPLATES, tokenizer_with, trained_runs

CONVERSATION = [
    {"role": "user", "content": "What is the opposite of hot?"},
    {"role": "assistant", "content": "Cold."},
    {"role": "user", "content": "Cold. And of cold?"},
    {"role": "assistant", "content": "Hot: 1 + 1 = 2, naïve 😀\n\n- two  blanks"},
]


def runs_of(tokenizer, messages, **options) -> list[str]:
    encoded = Encoder(tokenizer, options.pop("sequence_length", 512), **options).encode(Conversation(messages))
    return trained_runs(tokenizer, encoded.input_ids.tolist(), encoded.labels.tolist())


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [2, 4])
def test_exactly_answers_and_their_end_are_trained(name, turns):
    template = TEMPLATES[name]
    messages = CONVERSATION[:turns]
    answers = [message["content"] + template.end for message in messages if message["role"] == "assistant"]
    if name == "thoughts":
        answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
    if name == "no_generation_prompt":  # then the header is for the model to write
        answers = ["<|im_start|>assistant\n" + answer for answer in answers]
    tokenizer = tokenizer_with(template)
    assert runs_of(tokenizer, messages) == answers
    encoded = Encoder(tokenizer, 512).encode(Conversation(messages))
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, messages)


@pytest.mark.parametrize("name", ["headers", "chatml", "model_turns", "instructions"])
def test_the_prompt_before_the_answer_is_the_one_used_to_generate(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    encoded = Encoder(tokenizer, 512).encode(Conversation(CONVERSATION[:2]))
    prompt = encode_prompt(tokenizer, "What is the opposite of hot?")
    assert encoded.input_ids[: len(prompt)].tolist() == prompt
    assert (encoded.labels[: len(prompt)] == -100).all()
    assert (encoded.labels[len(prompt) : len(prompt) + 2] != -100).all()


def test_system_message_and_a_question_after_the_last_answer_are_not_trained():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    messages = [{"role": "system", "content": "Hot."}, *CONVERSATION[:2], {"role": "user", "content": "And of cold?"}]
    assert runs_of(tokenizer, messages) == ["Cold.<|im_end|>"]


def test_conversation_that_begins_with_an_answer():
    tokenizer = tokenizer_with(TEMPLATES["headers"])
    assert runs_of(tokenizer, CONVERSATION[1:]) == ["Cold.<|eot_id|>", CONVERSATION[3]["content"] + "<|eot_id|>"]


def test_trimmed_content_is_found():
    tokenizer = tokenizer_with(TEMPLATES["model_turns"])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "  Hello there. \n"}]
    assert runs_of(tokenizer, messages) == ["Hello there.<end_of_turn>"]


def test_refusing_template_makes_a_bad_row():
    tokenizer = tokenizer_with(TEMPLATES["model_turns"])
    with pytest.raises(BadRowError, match="no system role"):
        runs_of(tokenizer, [{"role": "system", "content": "Hot."}, *CONVERSATION[:2]])


def test_half_of_a_character_makes_a_bad_row():
    """JSON can write it, as where a text was cut inside an emoji; Python reads it and no tokenizer does."""
    torn = json.loads('"Hi \\ud83d"')
    tokenizer = tokenizer_with(TEMPLATES["headers"])
    with pytest.raises(BadRowError, match=r"half of a character \(\\ud83d in JSON\)"):
        runs_of(tokenizer, [{"role": "user", "content": torn}, {"role": "assistant", "content": "Hello"}])
    with pytest.raises(BadRowError, match="half of a character"):
        Encoder(tokenizer, 64, train_on_prompt=False).encode(torn)


def test_template_without_an_end_token_gets_eos_after_the_last_answer():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    assert runs_of(tokenizer, CONVERSATION[:2]) == ["assistant:\nCold.\n</s>"]


def test_fallback_template(caplog):
    tokenizer = tokenizer_with(None)
    with caplog.at_level("INFO"):
        assert ensure_chat_template(tokenizer)
    assert "no chat template" in caplog.text
    assert not ensure_chat_template(tokenizer)
    answers = [message["content"] + "</s>" for message in CONVERSATION[1::2]]
    assert runs_of(tokenizer, CONVERSATION) == answers


def test_train_on_prompt_trains_all_but_the_first_token():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    encoded = Encoder(tokenizer, 512, train_on_prompt=True).encode(Conversation(CONVERSATION))
    assert encoded.labels[0] == -100
    assert (encoded.labels[1:] == encoded.input_ids[1:]).all()


def test_text_is_trained_whole_and_ended():
    tokenizer = tokenizer_with(None)
    encoded = Encoder(tokenizer, 512).encode("one two three")
    assert tokenizer.decode(encoded.input_ids) == "one two three</s>"
    assert encoded.labels[0] == -100
    assert (encoded.labels[1:] == encoded.input_ids[1:]).all()


def test_long_samples_are_cut_at_the_right():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    whole = Encoder(tokenizer, 512).encode(Conversation(CONVERSATION))
    cut = Encoder(tokenizer, 30).encode(Conversation(CONVERSATION))
    assert not whole.cut
    assert cut.cut
    assert cut.input_ids.tolist() == whole.input_ids[:30].tolist()
    assert cut.labels.tolist() == whole.labels[:30].tolist()


def test_trimmed_offsets_train_blank_tokens_too():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    trimming = Tokenizer.from_str(json.dumps(raw))
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=trimming, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    trimmed.chat_template = tokenizer.chat_template
    messages = [CONVERSATION[0], {"role": "assistant", "content": "a   b \n\n  c "}]
    assert runs_of(trimmed, messages) == ["a   b \n\n  c <|im_end|>"]


def test_token_that_reaches_into_the_answer_is_trained():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    encoded = Encoder(tokenizer, 512).encode(
        Conversation([{"role": "user", "content": "What"}, {"role": "assistant", "content": "opposite"}])
    )
    pieces = [tokenizer.decode(token) for token in encoded.input_ids]
    assert pieces[:2] == ["What", " opposite"]  # one token holds the prompt's blank and the answer
    assert encoded.labels[0] == -100
    assert encoded.labels[1] == encoded.input_ids[1]


@pytest.mark.parametrize("blanks", [" ", "\n\n"])
def test_a_header_that_takes_in_the_first_blanks_of_an_answer_is_not_trained(blanks):
    tokenizer = load_tokenizer("builtin:demo")
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    headers = [AddedToken(name, rstrip=True, normalized=False, special=True) for name in names]  # as Phi 3 has them
    tokenizer.add_special_tokens({"additional_special_tokens": headers})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    turns = [("user", "Hot?"), ("assistant", f"{blanks}Cold."), ("user", "Cold?"), ("assistant", f"{blanks}Hot.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert runs_of(tokenizer, messages) == ["Cold.<|end|>", "Hot.<|end|>"]


@pytest.mark.parametrize("text", ["one two", "<s>one two", "one two</s>", "<s> one two </s>\n", "</s>"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_has_bos_and_eos_already_gets_no_second_one(text, adds_bos):
    tokenizer = tokenizer_with(None)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    ids = Encoder(tokenizer, 512).encode(text).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == (1 if adds_bos or "<s>" in text else 0)
    assert ids.count(tokenizer.eos_token_id) == 1


def test_answers_that_are_marked_untrained_carry_no_loss():
    tokenizer = tokenizer_with(TEMPLATES["chatml"])
    conversation = Conversation(CONVERSATION, untrained=frozenset({1}))
    encoded = Encoder(tokenizer, 512).encode(conversation)
    runs = trained_runs(tokenizer, encoded.input_ids.tolist(), encoded.labels.tolist())
    assert runs == [CONVERSATION[3]["content"] + "<|im_end|>"]
    everything = Encoder(tokenizer, 512, train_on_prompt=True).encode(conversation)
    runs = trained_runs(tokenizer, everything.input_ids.tolist(), everything.labels.tolist())
    assert "".join(runs) == tokenizer.decode(everything.input_ids[1:]).replace("Cold.<|im_end|>", "", 1)


def test_the_end_that_an_untrained_last_answer_gets_is_untrained_too():
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    encoded = Encoder(tokenizer, 512).encode(Conversation(CONVERSATION[:2], untrained=frozenset({1})))
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert not encoded.trained_tokens


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1), min_size=2, max_size=4
    )
)
def test_marks_without_offsets_agree_with_marks_by_offsets(contents):
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    encoder = Encoder(tokenizer_with(TEMPLATES["chatml"]), 10_000)
    answers = AnswerFinder(encoder.tokenizer).find(Conversation(messages))
    spans = list(answers.spans.values())
    ids, trained = encoder._mark_tokens(answers.text, spans)
    by_prefix_ids, by_prefix = encoder._mark_tokens_by_prefix(answers.text, spans)
    assert ids == by_prefix_ids
    assert trained == by_prefix
