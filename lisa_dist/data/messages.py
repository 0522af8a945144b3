"""One turn of a conversation as chat templates take it (role, text, tool calls), and the tools of a row."""

from __future__ import annotations

import json
import math
from typing import Any

Message = dict[str, Any]  # role and content; what else a chat template may use (tool_calls, name) is kept

# The role that chat templates know, and who speaks, in the words of many data sets.
ROLES = {
    "user": "human user",
    "assistant": "gpt assistant chatgpt bing bard model function_call tool_call",
    "system": "system",
    "developer": "developer",
    "tool": "tool observation tool_response function_response",
}
SPEAKERS = {speaker: role for role, speakers in ROLES.items() for speaker in speakers.split()}
CALLING = ("function_call", "tool_call")  # speakers whose text is the JSON of calls
ARGUMENTS = ("arguments", "parameters", "args", "input")  # what data call the arguments of a call
SCHEMAS = ("parameters", "input_schema", "inputSchema")  # and those that a tool takes
MARKS = ("weight", "train", "training", "loss")  # of a turn: 0 or false leaves it untrained
PART_MARKS = ("train_detail", "training_detail")  # of parts of a turn


class BadRowError(Exception):
    """A row that does not hold what its format needs; the message says why, without the place."""


def describe(value: object) -> str:
    """Return what ``value`` is, for messages."""
    return "nothing" if is_nothing(value) else f"{type(value).__name__} {str(value)[:40]!r}"


def is_nothing(value: object) -> bool:
    """Whether a cell is empty: null, or the NaN that tables hold in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys whose value is null: Arrow gives every object the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value


def holds_nulls(value: Any, within: bool = False) -> bool:
    """Whether arguments of a call or the schema of a tool, given as objects in ``value``, hold a null for a key."""
    if isinstance(value, dict):
        return any(
            (inner is None and within) or holds_nulls(inner, within or key in ARGUMENTS or key in SCHEMAS)
            for key, inner in value.items()
        )
    return isinstance(value, list | tuple) and any(holds_nulls(inner, within) for inner in value)


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as an ``object_pairs_hook``; :class:`BadRowError` where a key has two different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise BadRowError(f"a JSON object has a key with two values, found {describe(key)}")
    return found


def parse_json(text: str, what: str) -> Any:
    """Return what JSON ``text`` holds; ``what`` names it for the message.

    Raises:
        BadRowError: it is not JSON, or a key in it has two different values.
    """
    try:
        return json.loads(text, object_pairs_hook=keys_once)
    except (ValueError, RecursionError):
        raise BadRowError(f"{what} must be valid JSON, found {describe(text)}") from None


def check_json(value: Any, what: str) -> None:
    """Refuse dates, decimals and bytes, which Arrow has and JSON has not: templates get ``<date>`` in their place.

    Raises:
        BadRowError: ``value`` holds one; ``what`` names it for the message.
    """

    def refuse(other: object) -> None:
        raise BadRowError(f"{what} must hold texts, numbers, true and false alone, found {describe(other)}")

    json.dumps(value, default=refuse)


def read_turn(turn: dict[str, Any], speaker: str, role: str) -> tuple[Message, bool]:
    """Return a turn as a message, and whether it is one whose tokens carry loss.

    Nulls are dropped, text parts joined, and tool calls brought into the one form that templates know, their
    arguments an object.

    Args:
        turn: the keys of the message but for who speaks; ``content`` is its text.
        speaker: as the data call it, in lower case.
        role: as the chat template is to call it.

    Raises:
        BadRowError: the turn holds something else than text and tool calls, or a mark that says neither yes nor no.
    """
    apart = ("role", *MARKS, *PART_MARKS)
    message: Message = {"role": role, **without_nulls({name: turn[name] for name in turn if name not in apart})}
    calls = _tool_calls(message, speaker)
    if calls:
        message["tool_calls"] = calls
    message["content"] = _content(message)
    return message, _is_trained(turn, role)


def _content(message: Message) -> str:
    """Return a message's text: as it is, or joined from parts of type text."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise BadRowError(f"a message's content must be text, found {describe(content)}")
    return content


def _part(part: dict[str, Any]) -> str:
    if part.get("type") != "text":
        raise BadRowError(f"a message has a part of type {part.get('type')}, and only text can be trained")
    if not isinstance(part.get("text"), str):
        raise BadRowError(f"a message's part must have a text, found {describe(part.get('text'))}")
    return part["text"]


def _tool_calls(message: Message, speaker: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message, wherever they stand, and remove them from there."""
    calls = message.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = parse_json(calls, "a message's tool_calls")
    single = message.pop("function_call", None)  # as a call was written before there were tool_calls
    if single:
        calls = [*(calls or []), single]
    if speaker in CALLING:
        content = message.pop("content", None)
        found = parse_json(content, f"the text of a {speaker}") if isinstance(content, str) else content
        calls = [*(calls or []), *(found if isinstance(found, list) else [found])]
        if not calls:
            raise BadRowError(f"the text of a {speaker} must be a call or a list of calls, found {describe(content)}")
    if calls is not None and not isinstance(calls, list):
        raise BadRowError(f"a message's tool_calls must be a list, found {describe(calls)}")
    read = [_tool_call(call) for call in calls or []]
    if single and read[-1]["function"] in [call["function"] for call in read[:-1]]:  # the same call in both ways
        read.pop()
    return read


def _tool_call(call: object) -> dict[str, Any]:
    """Return a call as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"a tool call must be an object with a name, found {describe(call)}")
    if function is call:
        outside = {key: value for key, value in call.items() if key in ("id", "type", "index")}
        function = {key: value for key, value in call.items() if key not in outside}
    else:
        outside = {key: value for key, value in call.items() if key != "function"}
    if "arguments" not in function:
        given = next((key for key in ARGUMENTS if key in function), None)
        if given is None and "arguments" in outside:
            function = {**function, "arguments": outside.pop("arguments")}
        elif given is None and len(function) > 1:
            other = next(key for key in function if key != "name")
            raise BadRowError(f"a tool call's arguments must be an object under arguments, found {describe(other)}")
        function = {("arguments" if key == given else key): value for key, value in function.items()}
    read = {"type": "function", **outside, "function": {**function, "arguments": _arguments(function.get("arguments"))}}
    check_json(read, "a tool call")
    return read


def _arguments(value: object) -> dict[str, Any]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    arguments = parse_json(value, "the arguments of a tool call") if isinstance(value, str) else value
    if not isinstance(arguments, dict):
        raise BadRowError(f"the arguments of a tool call must be an object, found {describe(value)}")
    return arguments


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Return the tools of a row as JSON schemas: from a list of them or its JSON text, each one wrapped or bare.

    Raises:
        BadRowError: it is neither, or a tool has no name.
    """
    tools = without_nulls(value)
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, "column tools")
    if is_nothing(tools) or tools in ("", [], {}):
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise BadRowError(f"column tools must be a list of functions or its JSON text, found {describe(value)}")
    read = [_tool(tool) for tool in tools]
    check_json(read, "a tool")
    return read


def _tool(tool: object) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, "a tool")
    if not isinstance(tool, dict):
        raise BadRowError(f"a tool must be an object with a name, found {describe(tool)}")
    if isinstance(tool.get("function"), dict):
        return {"type": "function", **tool, "function": _with_parameters(tool["function"])}
    if isinstance(tool.get("name"), str):
        bare = {key: value for key, value in tool.items() if key != "type"}
        return {"type": "function", "function": _with_parameters(bare)}
    if isinstance(tool.get("type"), str):
        return tool  # a tool of the model's own, such as {"type": "code_interpreter"}
    raise BadRowError(f"a tool must be an object with a name, found {describe(tool)}")


def _with_parameters(function: dict[str, Any]) -> dict[str, Any]:
    """Return a function with its schema under the one name that templates know (Anthropic's API has another)."""
    given = next((key for key in SCHEMAS if key in function), None)
    return {("parameters" if key == given else key): value for key, value in function.items()}


def _is_trained(turn: dict[str, Any], role: str) -> bool:
    """Whether a turn carries loss by its marks: an answer without any does, and no other turn."""
    for name in PART_MARKS:
        if turn.get(name):
            raise BadRowError(f"a message has {name}, and an answer can only be trained whole")
    marks = {name: turn[name] for name in MARKS if not is_nothing(turn.get(name))}
    for name, value in marks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRowError(f"a message's {name} must be 0 or 1, or false or true, found {describe(value)}")
        if value and role != "assistant" and name != "weight":  # a weight of 1 is what every message has
            raise BadRowError(f"a message of role {role} is marked to be trained by {name}, only answers can be")
    return role == "assistant" and all(marks.values())
