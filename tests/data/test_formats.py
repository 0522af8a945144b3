from __future__ import annotations

import pytest

from lisa_dist.config import UserError
from lisa_dist.data.formats import BadRowError, Conversation, choose_format, to_sample

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


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
        ({"prompt": "q", "completion": "a"}, "prompt_completion", ASKED),
        ({"text": "t"}, "text", "t"),
        ({"messages": ASKED, "prompt": "q", "id": 3}, "chat", ASKED),
        (
            {"messages": [{**ASKED[0], "content": [{"type": "text", "text": "q"}], "name": None}, ASKED[1]]},
            "chat",
            ASKED,
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", ASKED),
        ({"conversations": ASKED}, "sharegpt", ASKED),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
            "sharegpt",
            [{"role": "system", "content": "s"}, *ASKED],
        ),
    ],
)
def test_every_format_is_found_and_converted(row, name, sample):
    chosen = choose_format("auto", {}, row)
    assert chosen.name == name
    assert to_sample(chosen, {}, row) == (Conversation(sample) if isinstance(sample, list) else sample)


@pytest.mark.parametrize("name", ["auto", "prompt_completion"])
def test_columns_rename(name):
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "q", "answer": "a"}
    chosen = choose_format(name, columns, row)
    assert chosen.name == "prompt_completion"
    assert to_sample(chosen, columns, row) == Conversation(ASKED)


@pytest.mark.parametrize(
    ("name", "columns", "row", "message"),
    [
        ("auto", {}, {"question": "q", "answer": "a"}, "no format fits the columns question, answer .*alpaca: instruc"),
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
        ("text", {"text": ["t"]}, "column text must be text"),
        ("chat", {"messages": []}, "column messages must be a list of turns, found nothing"),
        ("chat", {"messages": "hi"}, "column messages must be a list of turns, found str 'hi'"),
        ("chat", {"messages": [{"content": "a"}]}, "must have a role, found content"),
        ("chat", {"messages": [{"role": "assistant"}]}, "content must be text, found nothing"),
        ("chat", {"messages": ASKED[:1]}, "no turn is the assistant's"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "must be one of human, .*found 'alien'"),
    ],
)
def test_bad_rows(name, row, message):
    with pytest.raises(BadRowError, match=message):
        to_sample(choose_format(name, {}, row), {}, row)
