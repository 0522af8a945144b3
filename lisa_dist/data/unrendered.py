"""What a chat template leaves out of conversations: found by rendering them without it, or with a word put into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lisa_dist.data.marks import insert, text_of
from lisa_dist.data.messages import Message

Tools = list[dict[str, Any]] | None

NOT_RENDERED = "the chat template does not render {}, so the model neither sees nor learns them"
OF_RESULTS = (("tool", "name"), ("tool", "tool_call_id"))  # say which call a result is of; templates go by the order
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what data and templates call a message's thoughts


@dataclass(frozen=True)
class Rendered:
    """A conversation, what a chat template makes of it, and how to ask that template again."""

    messages: list[Message]
    tools: Tools
    text: str
    template: str
    tags: re.Pattern[str]  # of words that are whole, such as <think>
    free_word: str  # one that is not in the text
    render: Callable[[list[Message], Tools], str | None]  # None: the template refuses the messages


def note_unrendered(noted: dict[str, str], rendered: Rendered) -> None:
    """Note what the template never renders: tools, thoughts, arguments, other keys of messages.

    ``noted`` has "" for what it renders, else a sentence that says no; what is in there is not looked at again.
    """
    messages, tools, render = rendered.messages, rendered.tools, rendered.render
    last = messages[-1]
    fields = [name for name in THOUGHTS if isinstance(last.get(name), str) and last[name].strip()]
    for field in [*fields, "tools"] if tools else fields:
        if field in noted:
            continue
        bare = [*messages[:-1], {name: value for name, value in last.items() if name != field}]
        without = render(bare, None if field == "tools" else tools)
        if without is not None:
            noted[field] = NOT_RENDERED.format(field) if without == rendered.text else ""
    for field, index, message in _probes(rendered):
        if field in noted:
            continue
        text = render([*messages[:index], message, *messages[index + 1 :]], tools)
        if text is not None:
            noted[field] = "" if rendered.free_word in text else NOT_RENDERED.format(field)
    keys = {key for message in messages for key in message if (message["role"], key) not in OF_RESULTS}
    for key in sorted(keys - {"role", "content", "tool_calls"} - noted.keys()):
        if re.search(rf"\b{re.escape(key)}\b", rendered.template):  # in this place or another
            continue
        bare = [{name: value for name, value in message.items() if name != key} for message in messages]
        if render(bare, tools) == rendered.text:
            noted[key] = NOT_RENDERED.format(key)


def _probes(rendered: Rendered) -> Iterator[tuple[str, int, Message]]:
    """Yield parts of answers that may be left out: a name, the message's index, and it with the free word in there."""
    word, last = rendered.free_word, rendered.messages[-1]
    tag = rendered.tags.match(text_of(last["content"]).lstrip())
    if tag and last["role"] == "assistant" and isinstance(last["content"], str):
        marked = tag.group() + insert(tag.string[tag.end() :], word, at_end=False)
        what = f"the words behind {tag.group()} that begin a last answer"
        yield what, len(rendered.messages) - 1, {**last, "content": marked}
    for index, message in enumerate(rendered.messages):
        *others, call = message.get("tool_calls") or [{}]
        function = call.get("function", {})
        if (arguments := function.get("arguments")) and isinstance(arguments, dict):
            function = {**function, "arguments": {**arguments, list(arguments)[-1]: word}}
            calls = [*others, {**call, "function": function}]
            yield "the arguments of tool calls", index, {**message, "tool_calls": calls}
