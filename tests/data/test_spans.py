from __future__ import annotations

from pathlib import Path

import pytest
import trl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.spans import AnswerFinder
from tests.support.conversations import CONVERSATIONS, OSLO, SYSTEM, WEATHER, answer, call, result, user
from tests.support.templates import FAMILIES, NO_END, PREFILLED, TEMPLATES, Template, tokenizer_with

TWO = [user("The opposite of hot?"), answer("Cold."), user("Cold."), answer("Hot.")]


def runs_of(template: Template | str, messages, tools=None) -> list[str]:
    """Return the texts of the answers; a template's name means the one that trl has of that name."""
    tokenizer = tokenizer_with(template if isinstance(template, Template) else shipped(template))
    found = AnswerFinder(tokenizer).find(Conversation(messages, tools))
    return [found.text[begin:end] for begin, end in found.spans.values()]


def shipped(name: str) -> Template:
    tokens = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|im_start|>")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    return Template(file.read_text(), (*tokens, "<|im_end|>", "<|eot_id|>", "<|start_header_id|>"), "")


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, with_system):
    template = FAMILIES[name]
    begin = {"two tokens at the end": "<|start_response|>", "system in the last question": " "}.get(name, "")
    begin = " " if name == "system in the first question" else begin
    messages = [SYSTEM, *TWO] if with_system else TWO
    assert runs_of(template, messages) == [f"{begin}Cold.{template.end}", f"{begin}Hot.{template.end}"]
    again = [*messages[:-2], user("The opposite of hot?"), answer("Cold.")]  # all words occur twice
    assert runs_of(template, again) == [f"{begin}Cold.{template.end}"] * 2
    assert runs_of(template, messages[:-1]) == [f"{begin}Cold.{template.end}"]


def test_a_system_message_that_only_a_last_question_has_is_kept():
    template = Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
        "{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "</s>",
    )
    asked = user("What is cold? Cold.")
    for messages, text in (
        ([SYSTEM, asked, answer("Cold.")], f"<s>[INST] {SYSTEM['content']}\n\n{asked['content']}[/INST] Cold.</s>"),
        (
            [SYSTEM, user("Cold."), answer("Cold."), user("Cold."), answer("Cold.")],
            f"<s>[INST] Cold.[/INST] Cold.</s>[INST] {SYSTEM['content']}\n\nCold.[/INST] Cold.</s>",
        ),
    ):
        found = AnswerFinder(tokenizer_with(template)).find(Conversation(messages))
        assert found.text == text
        assert found.ended
        assert [text[begin:end] for begin, end in found.spans.values()] == [" Cold.</s>"] * (len(messages) // 2)


def test_other_blanks_before_the_opening_train_no_header():
    template = Template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + '\n' }}{% else %}"
        "{{ '    ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        (),
        "</s>",
    )
    assert runs_of(template, TWO) == [" Cold.</s>", " Hot.</s>"]


def test_an_opening_at_the_end_of_any_text_is_not_trained_between_two_answers():
    for name in ("always opened", "always opened, two tokens at the end"):
        template = FAMILIES[name]
        expected = [f"Cold.{template.end}", f"Ice.{template.end}", f"Hot.{template.end}"]
        assert runs_of(template, [*TWO[:2], answer("Ice."), *TWO[2:]]) == expected
        assert runs_of(template, [*TWO, answer("Ice.")]) == [expected[0], expected[2], expected[1]]


def test_tools_in_the_last_question_move_nothing():
    template = FAMILIES["system in the last question"]
    assert runs_of(template, [SYSTEM, *TWO], [WEATHER]) == [" Cold.</s>", " Hot.</s>"]


def test_the_next_header_ends_a_turn_that_has_no_end_of_its_own():
    messages = [OSLO, answer("", tool_calls=[call("Oslo")]), result("rain"), *TWO[1:]]
    calling = '\nget_weather\n{"city": "Oslo"}<|observation|>'
    assert runs_of(NO_END, messages) == [calling, "\nCold.<|user|>", "\nHot."]
    assert not AnswerFinder(tokenizer_with(NO_END)).find(Conversation(messages)).ended
    assert runs_of(NO_END, [user("a"), answer("see <|user|> there"), user("b"), answer("<|user|>")]) == [
        "\nsee <|user|> there<|user|>",
        "\n<|user|>",
    ]


def test_a_thought_that_the_prompt_begins_and_the_row_has_not_takes_nothing_off_the_answer():
    messages = [user("Hot?"), answer("<think>\nhm\n</think>Cold."), user("Bold?"), answer("<b>Yes</b>")]
    assert runs_of(PREFILLED, messages) == ["Cold.</s>", "<b>Yes</b></s>"]


def test_qwen3_leaves_out_the_thoughts_of_calls_once_a_question_follows():
    conversation = CONVERSATIONS["tools, thoughts before calls"]
    assert runs_of("qwen3", conversation.messages, conversation.tools) == [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "Rain.<|im_end|>",
        "<think>\n\n</think>\n\nYes.<|im_end|>",
    ]
    assert runs_of("qwen3", conversation.messages[:4], conversation.tools) == [
        "<think>\nI must look.\n</think>\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "<think>\nIt rains.\n</think>\n\nRain.<|im_end|>",
    ]


def test_gpt_oss_leaves_out_thoughts_and_ends_the_last_answer_by_another_token():
    messages = [OSLO, answer("", thinking="I look.", tool_calls=[call("Oslo")]), result("rain")]
    messages += [answer("Rain.", thinking="It rains."), user("Sure?"), answer("Yes.", thinking="I am.")]
    calling = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    last = "<|channel|>analysis<|message|>I am.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    assert runs_of("gptoss", messages) == [calling, "<|channel|>final<|message|>Rain.<|end|>", last]
    thought = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    assert runs_of("gptoss", messages[:3]) == [thought + calling]


def test_arguments_become_text_where_the_template_wants_text(tmp_path):
    (run,) = runs_of("deepseekv3", CONVERSATIONS["tools, a call at the end"].messages)
    assert '```json\n{"city": "Oslo"}\n```' in run
    as_it_comes = Template(  # Phi 4 mini's and InternLM 2's write arguments as they get them
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}{% endfor %}'
        "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (),
        "</s>",
    )
    assert runs_of(as_it_comes, CONVERSATIONS["tools, a call at the end"].messages) == [
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}</s>'
    ]


EMPTY_UNWRITTEN = (  # as by Gemma 4: an answer that says nothing is not written
    "{% for m in messages if m.content.strip() %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("llama3", [OSLO, answer("", tool_calls=[call("Oslo")])], r"leaves out a tool call of message 2 of 2"),
        (TEMPLATES["instructions"], [SYSTEM, *TWO], r"leaves out the content of message 1 of 5 \(system\)"),
        ("gptoss", CONVERSATIONS["tools, parallel calls"].messages, "leaves out a tool call of message 2 of 5"),
        ("gemma4", CONVERSATIONS["tools, words and a call"].messages, r"puts message 3 of 4 \(tool\) inside message 2"),
        ("gemma", [user("a"), user("b"), answer("c")], "must alternate"),
        (
            "{{ raise_exception('an odd count') if messages | length == 3 and add_generation_prompt }}"
            "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}",
            TWO,
            "gives no prompt for message 4 of 4",
        ),
        ("deepseekv3", CONVERSATIONS["tools, two calls in a row"].messages, "before message 4 of 6 .* otherwise once"),
        (  # the words of earlier questions are replaced
            "{% for m in messages %}<|{{ m.role }}|>"
            "{{ m.content if loop.last or messages[loop.index0 + 1:] | length < 2 else m.content | upper }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
            TWO,
            "otherwise once messages follow",
        ),
        (EMPTY_UNWRITTEN, [*TWO[:2], answer(""), *TWO[2:]], r"leaves out message 3 of 5 \(assistant\)"),
        (EMPTY_UNWRITTEN, [*TWO[:3], answer("\n")], r"leaves out message 4 of 4 \(assistant\)"),
    ],
)
def test_rows_are_refused_where_the_template_does_not_allow_them(template, messages, reason):
    if isinstance(template, str) and "{%" in template:
        template = Template(template, (), "</s>")
    with pytest.raises(BadRowError, match=reason):
        runs_of(template, messages)


def test_what_the_template_never_renders_is_noted_once():
    finder = AnswerFinder(tokenizer_with(TEMPLATES["chatml"]))
    for _ in range(2):
        finder.find(Conversation([user("a"), answer("b", reasoning_content="because")], [WEATHER]))
    assert [text.split(",")[0] for text in finder.rendered.values()] == [
        "the chat template does not render reasoning_content",
        "the chat template does not render tools",
    ]
    words = AnswerFinder(tokenizer_with(shipped("llama3_1")))
    for _ in range(2):
        words.find(Conversation([OSLO, answer("Let me look.", tool_calls=[call("Oslo")])]))
    assert [name for name, text in words.rendered.items() if text] == ["words"]


def test_thoughts_and_arguments_that_the_template_leaves_out_are_noted():
    """DeepSeek R1's and V3.1's templates leave out what stands before </think>, also of the answer that is trained."""
    thought = answer("<think>\nhm\n</think>\n\nCold.")
    finder = AnswerFinder(tokenizer_with(PREFILLED))
    finder.find(Conversation([user("Hot?"), answer("<b>Cold</b>")]))
    finder.find(Conversation([user("Hot?"), thought]))
    for content in ("hm\n</think>\n\nCold.", "Well <think>hm</think>Cold.", "<think>hm</think>Cold.</think>Or not."):
        finder.find(Conversation([user("Hot?"), answer(content)]))
    assert [name.partition(" form ")[2] for name, text in finder.rendered.items() if text] == [
        "<think>*</think>...",
        "*</think>...",
        "*<think>...</think>...",
        "...<think>*</think>...",
        "<think>*</think>...</think>...",
        "<think>...</think>*</think>...",
    ]
    known = AnswerFinder(tokenizer_with(shipped("qwen3")))
    known.find(Conversation([user("Hot?"), thought]))
    known.find(CONVERSATIONS["tools, a result and two answers"])
    assert not any(known.rendered.values())
    names_alone = Template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (),
        "</s>",
    )
    calling = AnswerFinder(tokenizer_with(names_alone))
    calling.find(CONVERSATIONS["tools, words and a call"])
    assert "the chat template does not render the arguments of tool calls" in "".join(calling.rendered.values())


def test_keys_of_messages_that_the_template_never_renders_are_noted():
    finder = AnswerFinder(tokenizer_with(TEMPLATES["chatml"]))
    messages = [
        user("a"),
        answer("b", reasoning_content="because", refusal="no", masked=True),
        result("c"),
        answer("d"),
    ]
    finder.find(Conversation([{**messages[0], "name": "Ann"}, *messages[1:]]))
    assert list(finder.rendered) == ["masked", "name", "reasoning_content", "refusal"]
    assert all(text.startswith("the chat template does not render") for text in finder.rendered.values())
    named = AnswerFinder(tokenizer_with(TEMPLATES["chatml"]))
    named.find(Conversation([user("a"), {"role": "bot", "content": "b"}, user("c"), answer("d")]))
    assert list(named.rendered.values()) == ["messages of role bot carry no loss: the role of answers is assistant"]
    known = AnswerFinder(tokenizer_with(shipped("qwen3")))  # it leaves this thought out, since a question follows
    known.find(Conversation([user("a"), answer("b", reasoning_content="because"), user("c"), answer("d")]))
    assert not known.rendered


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_5_think"])
def test_a_conversation_is_rendered_a_few_times_whatever_its_length(name, monkeypatch):
    tokenizer = tokenizer_with(shipped(name))
    finder = AnswerFinder(tokenizer)
    finder.find(Conversation(TWO))
    lengths = []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda messages, **k: lengths.append(len(messages)) or render(messages, **k)
    )
    finder.find(Conversation(TWO * 10))
    assert sorted(lengths)[-2:] == [40, 40]  # the whole, the whole with marks
    assert sum(lengths[2:]) <= 10  # and the prompt of the first answer


@pytest.mark.parametrize(
    "name", ["nemotron_3_nano", "qwen3_5_think", "qwen3", "gemma4", "diffusion_gemma", "deepseekv3"]
)
def test_answers_begin_where_their_own_prompts_end(name, monkeypatch):
    asked = [*TWO, user("Hot? /no_think"), answer("Cold."), user("<tool_response>\nx"), answer("<think>\n</think>b")]
    called = [OSLO, answer("", tool_calls=[call("Oslo")]), result("rain"), answer("Rain."), *asked]
    tokenizer = tokenizer_with(shipped(name))
    for messages in (asked, asked[2:] + TWO, called):
        found = AnswerFinder(tokenizer).find(Conversation(messages, [WEATHER]))
        with monkeypatch.context() as patch:
            patch.setattr("lisa_dist.data.spans.opens_by_a_constant", lambda template: False)
            assert AnswerFinder(tokenizer).find(Conversation(messages, [WEATHER])) == found


def chatml(contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "<|im_start|>system\nBe helpful.<|im_end|>\n", []
    for number, content in enumerate(contents):
        text += f"<|im_start|>{'assistant' if number % 2 else 'user'}\n"
        begin = len(text)
        text += f"{content}<|im_end|>"
        spans += [(begin, len(text))] * (number % 2)
        text += "\n"
    return text, spans


def headers(contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "<s>", []
    for number, content in enumerate(contents):
        text += f"<|start_header_id|>{'assistant' if number % 2 else 'user'}<|end_header_id|>\n\n"
        begin = len(text)
        text += f"{content.strip()}<|eot_id|>"
        spans += [(begin, len(text))] * (number % 2)
    return text, spans


def thoughts(contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for number, content in enumerate(contents):
        text += f"<|im_start|>{'assistant' if number % 2 else 'user'}\n"
        begin = len(text)
        thought = "<think>\n\n</think>\n\n" if number % 2 and number == len(contents) - 1 else ""
        text += f"{thought}{content}<|im_end|>"
        spans += [(begin, len(text))] * (number % 2)
        text += "\n"
    return text, spans


WORDS = ["assistant", "user", "\n", " ", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "Cold.", "zq0mk", "zqzq"]
CONTENT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from(WORDS)).map("".join)
FINDERS = {name: AnswerFinder(tokenizer_with(TEMPLATES[name])) for name in ("chatml", "headers", "thoughts")}


@pytest.mark.parametrize("build", [chatml, headers, thoughts])
@settings(max_examples=60, deadline=None)
@given(st.lists(CONTENT, min_size=2, max_size=7))
@example(["assistant", "assistant\n", "<|im_start|>assistant\n", "<|im_end|>", "", ""])
@example(["zq0mk", "zq1mk", "zqmk", "zqzq1mk"])
def test_spans_are_those_of_a_text_put_together_by_hand(build, contents):
    messages = [answer(text) if number % 2 else user(text) for number, text in enumerate(contents)]
    found = FINDERS[build.__name__].find(Conversation(messages))
    assert (found.text, list(found.spans.values())) == build(contents)
