"""The formats of instruction data, and how each becomes one internal form: a conversation, or plain text.

The words around a question are the chat template's alone: an Alpaca row becomes a user's message (the
instruction and, after a blank line, its input) and an answer, like every other format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest

Message = dict[str, Any]  # role and content; what else a chat template may use (tool_calls, name) is kept


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and what the chat template gets beside them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # the functions that may be called, as JSON schemas
    untrained: frozenset[int] = frozenset()  # answers, by their index among the messages, that carry no loss


Sample = Conversation | str

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class BadRowError(Exception):
    """A row that does not hold what its format needs; the message says why, without the place."""


@dataclass(frozen=True)
class Format:
    """A format: the columns it needs, those it may use, and how a row of them becomes a sample."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    to_sample: Callable[[dict[str, Any]], Sample]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional


def _text(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        raise BadRowError(f"column {column} must be text, found {'nothing' if value is None else _kind(value)}")
    return value


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _from_alpaca(values: dict[str, Any]) -> Sample:
    question = _text(values, "instruction")
    if values.get("input"):
        question = f"{question}\n\n{_text(values, 'input')}"
    return _asked(question, _text(values, "output"))


def _from_prompt_completion(values: dict[str, Any]) -> Sample:
    return _asked(_text(values, "prompt"), _text(values, "completion"))


def _asked(question: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _from_text(values: dict[str, Any]) -> Sample:
    return _text(values, "text")


def _turns(values: dict[str, Any], column: str) -> list[dict[str, Any]]:
    turns = values.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        found = "nothing" if turns is None or turns == [] else _kind(turns)
        raise BadRowError(f"column {column} must be a list of turns, found {found}")
    return turns


def _from_chat(values: dict[str, Any]) -> Sample:
    messages = []
    for turn in _turns(values, "messages"):
        message = {name: value for name, value in turn.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise BadRowError(f"a message must have a role, found {', '.join(map(str, turn)) or 'an empty one'}")
        message["content"] = _content(message)
        messages.append(message)
    return Conversation(messages)


def _content(message: Message) -> str:
    """Return a message's text: as it is, or joined from parts of type text."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise BadRowError(f"a message's content must be text, found {'nothing' if content is None else _kind(content)}")
    return content


def _from_sharegpt(values: dict[str, Any]) -> Sample:
    messages: list[Message] = []
    if values.get("system"):
        messages.append({"role": "system", "content": _text(values, "system")})
    for turn in _turns(values, "conversations"):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise BadRowError(f"a turn's speaker must be one of {', '.join(SHAREGPT_ROLES)}, found {speaker!r}")
        content = turn.get("value", turn.get("content"))
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": _content({"content": content})})
    return Conversation(messages)


FORMATS = {
    known.name: known
    for known in (
        Format("chat", ("messages",), (), _from_chat),
        Format("sharegpt", ("conversations",), ("system",), _from_sharegpt),
        Format("alpaca", ("instruction", "output"), ("input",), _from_alpaca),
        Format("prompt_completion", ("prompt", "completion"), (), _from_prompt_completion),
        Format("text", ("text",), (), _from_text),
    )
}


def choose_format(name: str, columns: dict[str, str], found: Iterable[str]) -> Format:
    """Return the format named ``name``, or for ``auto`` the first one whose columns the first row has.

    Args:
        name: ``data.format``.
        columns: ``data.columns``: the format's column -> the file's column.
        found: the first row's columns.

    Raises:
        UserError: no format fits, or ``columns`` names a column that the format or the file does not have.
    """
    found = list(found)
    for ours, theirs in columns.items():
        if theirs not in found:
            have = ", ".join(found)
            raise UserError(
                f"data.columns.{ours}={theirs}: no such column, the data have {have}{nearest(theirs, found)}"
            )
    if name == "auto":
        chosen = _detect(columns, found)
    else:
        chosen = FORMATS[name]
    for ours in columns:
        if ours not in chosen.columns:
            raise UserError(
                f"data.columns.{ours}: format {chosen.name} has the columns {', '.join(chosen.columns)}"
                f"{nearest(ours, chosen.columns)}"
            )
    missing = [column for column in chosen.required if columns.get(column, column) not in found]
    if missing:
        raise UserError(
            f"data.format={chosen.name}: needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, "
            f"the data have {', '.join(found)}; name them with data.columns={{{missing[0]}: ...}}"
        )
    return chosen


def _detect(columns: dict[str, str], found: list[str]) -> Format:
    names = {ours for ours in FORMATS_COLUMNS if columns.get(ours, ours) in found}
    for known in FORMATS.values():
        if names.issuperset(known.required):
            return known
    needs = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS.values())
    raise UserError(
        f"data.format=auto: no format fits the columns {', '.join(found)} (needed are {needs}); "
        f"set data.format, and data.columns to rename"
    )


FORMATS_COLUMNS = {column for known in FORMATS.values() for column in known.columns}


def to_sample(chosen: Format, columns: dict[str, str], values: dict[str, Any]) -> Sample:
    """Turn one row into a conversation, or into plain text for the format ``text``.

    Raises:
        BadRowError: the row does not hold what the format needs.
    """
    sample = chosen.to_sample({ours: values.get(columns.get(ours, ours)) for ours in chosen.columns})
    if isinstance(sample, Conversation) and not any(message["role"] == "assistant" for message in sample.messages):
        raise BadRowError("no turn is the assistant's, so there is nothing to learn")
    return sample
