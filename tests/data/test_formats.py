from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pytest

from lisa_dist.config import UserError
from lisa_dist.data.formats import BadRowError, Conversation, choose_format


def asked(question: str, answer: str = "a") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ASKED = asked("q")
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "name", "sample"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": "", "output": "a", "category": "x"}, "alpaca", ASKED),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "alpaca",
            [{"role": "user", "content": "q\n\ni"}, {"role": "assistant", "content": "a"}],
        ),
        ({"instruction": "", "input": "q", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": None, "output": "a", "history": []}, "alpaca", ASKED),
        ({"instruction": "q", "input": float("nan"), "output": "a", "system": ""}, "alpaca", ASKED),
        ({"instruction": "q", "input": 0, "output": "a"}, "alpaca", asked("q\n\n0")),
        ({"instruction": "q", "input": False, "output": "a"}, "alpaca", asked("q\n\nfalse")),
        ({"instruction": "q", "input": -0.5, "output": "a"}, "alpaca", asked("q\n\n-0.5")),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
            "alpaca",
            [SYSTEM, *asked("q1", "a1"), *asked("q2", "a2"), *ASKED],
        ),
        ({"instruction": "q", "output": "a", "history": '[["q1", "a1"]]'}, "alpaca", [*asked("q1", "a1"), *ASKED]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", ASKED),
        ({"question": "q", "answer": "a"}, "prompt_completion", ASKED),
        ({"prompt": "q", "answer": "a", "system": "s"}, "prompt_completion", [SYSTEM, *ASKED]),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, "prompt_completion", ASKED),
        ({"prompt": [SYSTEM, ASKED[0]], "completion": "a"}, "prompt_completion", [SYSTEM, *ASKED]),
        ({"prompt": json.dumps(ASKED[:1]), "completion": json.dumps(ASKED[1:])}, "prompt_completion", ASKED),
        ({"prompt": "[1]", "completion": '[{"role": 1}, 2]'}, "prompt_completion", asked("[1]", '[{"role": 1}, 2]')),
        ({"text": "t"}, "text", "t"),
        ({"messages": ASKED, "prompt": "q", "id": 3}, "chat", ASKED),
        (
            {"messages": [{**ASKED[0], "content": [{"type": "text", "text": "q"}], "name": None}, ASKED[1]]},
            "chat",
            ASKED,
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", ASKED),
        ({"conversations": ASKED}, "sharegpt", ASKED),
        ({"conversations": [{"from": " Human", "value": "q"}, {"from": "GPT", "value": "a"}]}, "sharegpt", ASKED),
        ({"conversations": json.dumps(ASKED)}, "sharegpt", ASKED),
        ({"messages": json.dumps(ASKED), "system": "s"}, "chat", [SYSTEM, *ASKED]),
        ({"messages": [SYSTEM, *ASKED], "system": "s"}, "chat", [SYSTEM, *ASKED]),
        ({"messages": [{"role": "User ", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}, "chat", ASKED),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}, "chat", ASKED),
        (
            {"messages": [{"role": "Developer", "content": "s"}, *ASKED, {"role": "observation", "content": "o"}]},
            "chat",
            [{"role": "developer", "content": "s"}, *ASKED, {"role": "observation", "content": "o"}],
        ),
        (
            {"messages": [ASKED[0], {"role": "function", "name": "f", "content": "12"}, ASKED[1]]},
            "chat",
            [ASKED[0], {"role": "tool", "name": "f", "content": "12"}, ASKED[1]],
        ),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
            "sharegpt",
            [{"role": "system", "content": "s"}, *ASKED],
        ),
        ({"text": "a", "label": True}, "text", "a"),
    ],
)
def test_every_format_is_found_and_converted(row, name, sample):
    chosen = choose_format("auto", {}, row)
    assert chosen.name == name
    assert chosen.to_sample(row) == (Conversation(sample) if isinstance(sample, list) else sample)


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({}, {"question": 5, "answer": "a"}, "column question must be text, found int '5'"),
        ({}, {"question": "q", "answer": None}, "column answer must be text, found nothing"),
        (
            {"prompt": "ask", "system": "rules"},
            {"ask": "q", "completion": "a", "rules": 7},
            "column rules must be text",
        ),
    ],
)
def test_a_bad_row_is_told_by_the_name_that_its_column_has_in_the_file(columns, row, message):
    with pytest.raises(BadRowError, match=message):
        choose_format("prompt_completion", columns, row).to_sample(row)


@pytest.mark.parametrize("name", ["auto", "prompt_completion"])
def test_columns_rename(name):
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "q", "answer": "a"}
    chosen = choose_format(name, columns, row)
    assert chosen.name == "prompt_completion"
    assert chosen.to_sample(row) == Conversation(ASKED)


@pytest.mark.parametrize(
    ("name", "columns", "row", "message"),
    [
        ("auto", {}, {"query": "q", "answer": "a"}, "no format fits the columns query, answer .*alpaca: instruc"),
        ("auto", {}, {"prompt": "q", "chosen": "a", "rejected": "b"}, "column rejected belongs to preferences"),
        ("auto", {}, {"messages": ASKED, "kto_tag": True}, "column kto_tag belongs to preferences"),
        ("auto", {}, {"prompt": "q", "completion": "a", "label": False}, "column label belongs to preferences"),
        ("auto", {}, {"prompt": "q", "completion": "a", "label": "False"}, "column label belongs to preferences"),
        ("auto", {}, {"prompt": "q", "completion": "a", "label": 0}, "column label belongs to preferences"),
        ("auto", {}, {"messages": ASKED, "label": False}, "column label belongs to preferences"),
        (
            "alpaca",
            {},
            {"instruction": "q", "answer": "a"},
            "needs the column output, the data have instruction, answer",
        ),
        ("alpaca", {"output": "anser"}, {"instruction": "q", "answer": "a"}, "output=anser: no such .*mean answer"),
        ("alpaca", {"ouput": "answer"}, {"instruction": "q", "answer": "a"}, "ouput: format alpaca has .*mean output"),
    ],
)
def test_columns_that_do_not_fit(name, columns, row, message):
    with pytest.raises(UserError, match=message):
        choose_format(name, columns, row)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("alpaca", {"instruction": "q", "output": None}, "column output must be text, found nothing"),
        ("alpaca", {"instruction": "q", "output": 3}, "column output must be text, found int '3'"),
        ("alpaca", {"instruction": "q", "output": float("nan")}, "column output must be text, found nothing"),
        ("alpaca", {"instruction": "q", "output": "a", "input": ["i"]}, "column input must be text, found list"),
        ("alpaca", {"instruction": "q", "output": "a", "history": ["q1", "a1"]}, r"must be a list of \[question, answ"),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "history": "q1"},
            "column history must be valid JSON, found str",
        ),
        ("alpaca", {"instruction": "q", "output": "a", "system": 7}, "column system must be text, found int '7'"),
        (
            "alpaca",
            {"instruction": "q", "output": "a", "images": ["x.png"]},
            "column images has content, and only text",
        ),
        ("prompt_completion", {"prompt": "q", "completion": ASKED}, "the completion begins with the prompt"),
        ("prompt_completion", {"prompt": ASKED[:1], "completion": ASKED}, "the completion begins with the prompt"),
        ("prompt_completion", {"prompt": str(ASKED[:1]), "completion": "a"}, "column prompt must be valid JSON, found"),
        ("prompt_completion", {"prompt": "q", "completion": [SYSTEM]}, "no turn of the completion is the assistant's"),
        ("chat", {"messages": [SYSTEM, *ASKED], "system": "other"}, "two different system prompts, found 'other'"),
        ("text", {"text": ["t"]}, "column text must be text"),
        ("chat", {"messages": []}, "column messages must be a list of turns, found nothing"),
        (
            "chat",
            {"messages": ASKED, "tools": [{"name": "x", "parameters": {"default": Decimal("1.5")}}]},
            "a tool must hold texts, numbers, true and false alone, found Decimal '1.5'",
        ),
        ("chat", {"messages": "hi"}, "column messages must be a list of turns, found str 'hi'"),
        ("chat", {"messages": [{"content": "a"}]}, "must have a role, found content"),
        ("chat", {"messages": [{"role": "assistant"}]}, "content must be text, found nothing"),
        ("chat", {"messages": ASKED[:1]}, "no turn is the assistant's"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of type image, and only text",
        ),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": 0}]}]}, "must have a text, found"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "must be one of human, .*found 'alien'"),
    ],
)
def test_bad_rows(name, row, message):
    with pytest.raises(BadRowError, match=message):
        choose_format(name, {}, row).to_sample(row)


CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CALLS = [{"type": "function", "function": CALL}]
CALLED = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": CALLS}]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "weather", "arguments": '{"city": "Oslo"}'},
        {"name": "weather", "parameters": {"city": "Oslo"}},
        {"name": "weather", "args": {"city": "Oslo"}},
        {"name": "weather", "input": {"city": "Oslo"}},
        {"function": {"name": "weather"}, "arguments": {"city": "Oslo"}},
        {"type": "function", "function": CALL},
        {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"type": None, "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}}},
    ],
)
def test_tool_calls_have_one_form_and_their_arguments_are_objects(call):
    answers = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": json.dumps([call])},
        {"role": "assistant", "content": "", "function_call": call},
        {"role": "assistant", "content": "", "function_call": call, "tool_calls": [call]},
        {"role": "tool_call", "content": json.dumps(call)},
    ]
    for answer in answers[: 4 if call.get("type", "") is not None else 1]:
        row = {"messages": [ASKED[0], answer]}
        assert choose_format("auto", {}, row).to_sample(row) == Conversation(CALLED)


def test_calls_of_sharegpt_and_what_they_gave():
    calls = [CALL, {"name": "time", "arguments": {}}]
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "12"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {"type": "object", "default": None}}]),
    }
    both = [{"type": "function", "function": call} for call in calls]
    sample = choose_format("auto", {}, row).to_sample(row)
    assert sample.messages == [
        ASKED[0],
        {"role": "assistant", "content": "", "tool_calls": both},
        {"role": "tool", "content": "12"},
        ASKED[1],
    ]
    schema = {"name": "weather", "parameters": {"type": "object", "default": None}}  # a null of JSON text is meant
    assert sample.tools == [{"type": "function", "function": schema}]
    assert sample.untrained == frozenset()


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("column", "tools", "expected"),
    [
        ("tools", [TOOL], [TOOL]),
        ("tools", json.dumps([TOOL]), [TOOL]),
        ("tools", [json.dumps(TOOL)], [TOOL]),
        ("tools", [TOOL["function"]], [TOOL]),
        ("tools", {"type": "function", **TOOL["function"]}, [TOOL]),
        ("functions", [TOOL["function"]], [TOOL]),
        ("tools", [{"name": "weather", "input_schema": {"type": "object"}}], [TOOL]),
        ("tools", [{"type": "function", "function": {"name": "weather", "inputSchema": {"type": "object"}}}], [TOOL]),
        ("tools", [{"type": "code_interpreter"}], [{"type": "code_interpreter"}]),
        ("tools", [], None),
        ("tools", "", None),
        ("tools", "[]", None),
        ("tools", None, None),
    ],
)
def test_tools_of_a_row(column, tools, expected):
    row = {"messages": CALLED, column: tools}
    chosen = choose_format("auto", {}, row)
    assert chosen.to_sample(row) == Conversation(CALLED, expected)
    assert chosen.unread(row) == set()


def test_nulls_that_arrow_padded_are_removed():
    rows = []
    for name, key in (("weather", "city"), ("time", "zone")):
        call = {"type": "function", "function": {"name": name, "arguments": {key: {"of": "x", key: [1, None]}}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        schema = {"type": "object", "properties": {key: {"type": "string"}}}
        tool = {"type": "function", "function": {"name": name, "parameters": schema}}
        rows.append({"messages": [ASKED[0], answer], "tools": [tool]})
    padded = pa.Table.from_pylist(rows).to_pylist()
    assert padded != rows
    for row, given in zip(padded, rows, strict=True):
        assert choose_format("auto", {}, row).to_sample(row) == Conversation(given["messages"], given["tools"])


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "tool_calls": {"name": "x"}}, "tool_calls must be a list, found dict"),
        ({"role": "assistant", "tool_calls": ["x"]}, "a tool call must be an object with a name, found str 'x'"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "must be an object with a name"),
        ({"role": "assistant", "tool_calls": [{"name": "x", "arguments": "{"}]}, "must be valid JSON, found str '{'"),
        ({"role": "assistant", "tool_calls": [{"name": "x", "arguments": "[1]"}]}, "must be an object, found str"),
        (
            {"role": "assistant", "tool_calls": [{"name": "x", "arguments": '{"a": 1, "a": 2}'}]},
            "a key with two values, found str 'a'",
        ),
        ({"role": "assistant", "tool_calls": [{"name": "x", "city": "Oslo"}]}, "under arguments, found str 'city'"),
        (
            {"role": "assistant", "tool_calls": [{"name": "x", "arguments": {"a": [datetime.date(2024, 1, 2)]}}]},
            "a tool call must hold texts, numbers, true and false alone, found date '2024-01-02'",
        ),
        ({"role": "tool_call", "content": "call x"}, "the text of a tool_call must be valid JSON"),
        ({"role": "tool_call", "content": "[]"}, "must be a call or a list of calls"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight must be 0 or 1, .*found float '0.5'"),
        ({"role": "assistant", "content": "a", "train": "no"}, "train must be 0 or 1, .*found str 'no'"),
        ({"role": "user", "content": "a", "loss": True}, "role user is marked to be trained by loss"),
        ({"role": "assistant", "content": "a", "train_detail": [{}]}, "has train_detail, and an answer can only"),
    ],
)
def test_turns_that_can_not_be_read(turn, message):
    row = {"messages": [*ASKED, turn]}
    with pytest.raises(BadRowError, match=message):
        choose_format("auto", {}, row).to_sample(row)


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "gpt", "value": "a", "content": "b"}, "another text as content than as value, found str 'b'"),
        ({"from": "gpt", "value": "a", "role": "user"}, "another speaker as role than as from, found str 'user'"),
    ],
)
def test_a_turn_that_says_two_things_is_refused(turn, message):
    asked = {"from": "human", "role": "user", "value": "q", "content": "q"}  # one thing in two ways
    row = {"conversations": [asked, {"from": "gpt", "value": "a", "content": "", "role": "doctor"}, asked, turn]}
    with pytest.raises(BadRowError, match=message):
        choose_format("auto", {}, row).to_sample(row)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}, {"loss": 0.0}])
def test_answers_that_are_marked_stay_untrained(mark):
    turns = [
        SYSTEM,
        ASKED[0],
        {**ASKED[1], **mark},
        {**ASKED[0], "weight": 1, "train": None},
        {**ASKED[1], "weight": 1},
    ]
    chat = {"messages": turns[1:], "system": "s"}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    talk = [{"from": names[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in map(dict, turns)]
    for row in (chat, {"conversations": talk}):
        sample = choose_format("auto", {}, row).to_sample(row)
        assert sample == Conversation([SYSTEM, *ASKED, *ASKED], untrained=frozenset({2}))


def test_of_a_prompt_of_messages_only_the_completion_is_trained():
    row = {"prompt": [*ASKED, ASKED[0]], "completion": [*ASKED[1:], *ASKED], "tools": [TOOL]}
    sample = choose_format("auto", {}, row).to_sample(row)
    assert sample == Conversation([*ASKED, *ASKED, *ASKED], [TOOL], frozenset({1}))


def test_columns_that_are_not_read_are_known():
    row = {"question": "q", "answer": "a", "id": 0, "source": "", "notes": None, "prompt": None}
    assert choose_format("auto", {}, row).unread(row) == {"id"}
    row = {"prompt": "q", "question": "other", "answer": "a"}
    assert choose_format("auto", {}, row).unread(row) == {"question"}
    assert choose_format("auto", {"prompt": "question"}, row).unread(row) == {"prompt"}
