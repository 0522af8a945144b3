"""What a chat template leaves out of conversations: found by rendering them without it, or with a word put into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lisa_dist.data.marks import insert
from lisa_dist.data.messages import SPEAKERS, Message

Tools = list[dict[str, Any]] | None

NOT_RENDERED = "the chat template does not render {}, so the model neither sees nor learns them"
OF_RESULTS = (("tool", "name"), ("tool", "tool_call_id"))  # say which call a result is of; templates go by the order
TAG = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]")  # as <think>, [/THINK]
TAGS_PROBED = 3  # of an answer: a second thought, and what stands around both
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what data and templates call a message's thoughts


@dataclass(frozen=True)
class Rendered:
    """A conversation, what a chat template makes of it, and how to ask that template again."""

    messages: list[Message]
    tools: Tools
    text: str
    template: str
    free_word: str  # one that is not in the text
    render: Callable[[list[Message], Tools], str | None]  # None: the template refuses the messages


def note_unrendered(noted: dict[str, str], rendered: Rendered) -> None:
    """Note what the template never renders: tools, thoughts, arguments, other keys of messages; and whose words it does
    render though neither it nor the masks know the role, as ``bot`` beside ``assistant``.

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
    roles = {message["role"] for message in messages} - SPEAKERS.keys()
    strange = sorted(role for role in roles if not re.search(rf"\b{re.escape(role)}\b", rendered.template))
    if strange:
        noted.setdefault("role", f"messages of role {strange[0]} carry no loss: the role of answers is assistant")
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
    if last["role"] == "assistant" and isinstance(last["content"], str):
        for form, marked in _marked_between_tags(rendered, last["content"]):
            what = f"the words at * in last answers of the form {form}"
            yield what, len(rendered.messages) - 1, {**last, "content": marked}
    for index, message in enumerate(rendered.messages):
        *others, call = message.get("tool_calls") or [{}]
        function = call.get("function", {})
        if (arguments := function.get("arguments")) and isinstance(arguments, dict):
            function = {**function, "arguments": {**arguments, list(arguments)[-1]: word}}
            calls = [*others, {**call, "function": function}]
            yield "the arguments of tool calls", index, {**message, "tool_calls": calls}


def _marked_between_tags(rendered: Rendered, content: str) -> Iterator[tuple[str, str]]:
    """Yield how words stand between the first tags of a text that the template looks for, and it with the free word.

    The form of ``a<think>b`` is ``*<think>...`` where the word is in front of ``a``, ``...<think>*`` where it is in
    front of ``b``.
    """

    def is_known(tag: str) -> bool:
        bare = tag.replace("/", "", 1)
        return bare in rendered.template or f"{bare[0]}/{bare[1:]}" in rendered.template

    tags = [match for match in TAG.finditer(content) if is_known(match.group())][:TAGS_PROBED]
    ends = [0, *(tag.end() for tag in tags)]
    parts = [content[end : tag.start()].strip() and "..." for end, tag in zip(ends, tags)]
    parts.append(content[ends[-1] :].strip() and "...")
    for number, part in enumerate(parts):
        if part and tags:
            shown = [*parts[:number], "*", *parts[number + 1 :]]
            form = "".join(words + tag for words, tag in zip(shown, [*(tag.group() for tag in tags), ""]))
            yield form, content[: ends[number]] + insert(content[ends[number] :], rendered.free_word, at_end=False)
