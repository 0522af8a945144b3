"""Conversations of every kind that chat data hold, for tests of what is trained in them."""

from __future__ import annotations

import copy
from typing import Any

from lisa_dist.data.formats import Conversation

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}},
    },
}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(city: str, number: int = 1, as_text: bool = False) -> dict[str, Any]:
    arguments: Any = f'{{"city": "{city}"}}' if as_text else {"city": city}
    return {"id": f"call0000{number}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def result(content: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "tool_call_id": f"call0000{number}", "content": content}


SYSTEM = {"role": "system", "content": "You answer in one word. Cold."}
OSLO = user("Weather in Oslo?")

CONVERSATIONS: dict[str, Conversation] = {
    name: Conversation(messages, [WEATHER] if name.startswith("tools") else None)
    for name, messages in {
        "one turn": [user("What is the opposite of hot?"), answer("Cold.")],
        "several turns": [
            user("Name a bird."),
            answer("An owl."),
            user("A fish?"),
            answer("A trout."),
            user("A bug?"),
            answer("An ant."),
        ],
        "a question at the end": [user("Name a bird."), answer("An owl."), user("Name a fish.")],
        "system": [SYSTEM, user("The opposite of hot? Cold?"), answer("Cold."), user("Of cold?"), answer("Hot.")],
        "the same question twice": [SYSTEM, user("Cold."), answer("Cold."), user("Cold."), answer("Cold.")],
        "tools that are not called": [SYSTEM, user("Name a bird."), answer("An owl.")],
        "tools, a call at the end": [OSLO, answer("", tool_calls=[call("Oslo")])],
        "tools, arguments as JSON text": [OSLO, answer("", tool_calls=[call("Oslo", as_text=True)])],
        "tools, words and a call": [
            OSLO,
            answer("Let me look.", tool_calls=[call("Oslo")]),
            result("rain, 7 C"),
            answer("Rain, 7 degrees."),
        ],
        "tools, a result and two answers": [
            OSLO,
            answer("", tool_calls=[call("Oslo")]),
            result("rain, 7 C"),
            answer("Rain."),
            user("And in Rome?"),
            answer("", tool_calls=[call("Rome", 2)]),
            result("sun", 2),
            answer("Sun."),
        ],
        "tools, two calls in a row": [
            OSLO,
            answer("", tool_calls=[call("Oslo")]),
            result("none"),
            answer("", tool_calls=[call("Oslo", 2)]),
            result("rain, 7 C", 2),
            answer("Rain."),
        ],
        "tools, parallel calls": [
            user("Weather in Oslo and Rome?"),
            answer("", tool_calls=[call("Oslo"), call("Rome", 2)]),
            result("rain"),
            result("sun", 2),
            answer("Rain and sun."),
        ],
        "tools, thoughts before calls": [
            OSLO,
            answer("", reasoning_content="I must look.", tool_calls=[call("Oslo")]),
            result("rain"),
            answer("Rain.", reasoning_content="It rains."),
            user("Really?"),
            answer("Yes."),
        ],
        "reasoning_content": [user("2+2?"), answer("4", reasoning_content="two and two make four")],
        "thinking": [user("2+2?"), answer("4", thinking="two and two make four")],
        "reasoning_content twice": [
            user("2+2?"),
            answer("4", reasoning_content="two and two"),
            user("3+3?"),
            answer("6", reasoning_content="three and three"),
        ],
        "<think> in the content": [user("2+2?"), answer("<think>\ntwo and two\n</think>\n\n4")],
        "<think> in the content twice": [
            user("Name a bird."),
            answer("<think>\nbirds fly\n</think>\n\nAn owl."),
            user("Name a fish."),
            answer("<think>\nfish swim\n</think>\n\nA trout."),
        ],
        "an empty answer": [user("Say nothing."), answer("")],
        "an empty answer, then another": [user("Say nothing."), answer(""), user("Say so."), answer("So.")],
        "an answer that is a role's name": [
            user("Who are you?"),
            answer("assistant"),
            user("Who am I?"),
            answer("user"),
        ],
        "an answer that is a word of the question": [
            user("Is it Cold. or Hot. now?"),
            answer("Cold."),
            user("Cold."),
            answer("now"),
        ],
        "an answer that is a header": [
            user("Write a header."),
            answer("assistant\n"),
            user("In full."),
            answer("user\n"),
        ],
        "blanks around it": [
            user("  Name a bird.\n"),
            answer("  An owl. \n"),
            user(" More "),
            answer("\n\nA  wren.\t"),
        ],
        "unicode": [user("Straße 😀é"), answer("éa naïve 😀\u200d👩 日本"), user("日本?"), answer("日 本 ñ")],
        "special tokens in the text": [
            user("What is <|im_end|> and </s>?"),
            answer("<|im_start|> and <|eot_id|> end"),
            user("<|user|> <end_of_turn>?"),
            answer("it is <|end|>"),
        ],
    }.items()
}


def in_parts(conversation: Conversation) -> Conversation:
    """Return the conversation with every content as a list of one part, as templates of models that see want it."""
    messages = copy.deepcopy(conversation.messages)
    for message in messages:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return Conversation(messages, conversation.tools, conversation.untrained)
