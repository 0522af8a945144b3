"""The formats of instruction data, and how each becomes one internal form: a conversation, or plain text.

The words around a question are the chat template's alone: an Alpaca row becomes a user's message (the
instruction and, after a blank line, its input) and an answer, like every other format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest
from lisa_dist.data.messages import (
    SPEAKERS,
    BadRowError,
    Message,
    describe,
    holds_nulls,
    is_nothing,
    parse_json,
    read_tools,
    read_turn,
)

__all__ = ["BadRowError", "Conversation", "Message", "RowFormat", "Sample", "choose_format", "read_messages"]


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and what the chat template gets beside them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None  # the functions that may be called, as JSON schemas
    untrained: frozenset[int] = frozenset()  # answers, by their index among the messages, that carry no loss


Sample = Conversation | str
Turn = tuple[Message, bool]  # and whether it carries loss

PREFERENCES = ("rejected", "kto_tag")  # columns that only data of preferences have
TRUTHS = ("true", "false", "0", "1")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
FUNCTIONS = {"tools": ("functions",)}  # as the column was called before there were tools


@dataclass(frozen=True)
class Format:
    """A format: the columns it needs, those it may use, and how a row of them becomes a sample."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    to_sample: Callable[[dict[str, Any]], Sample]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # a column's other names

    @property
    def columns(self) -> tuple[str, ...]:
        return self.required + self.optional


@dataclass(frozen=True)
class RowFormat:
    """A format together with ``data.columns``: the format's column -> the file's column."""

    format: Format
    columns: dict[str, str]

    @property
    def name(self) -> str:
        return self.format.name

    def names(self, column: str) -> tuple[str, ...]:
        """Return what the file may call ``column``, the first that a row has being the one that is read."""
        if column in self.columns:
            return (self.columns[column],)
        return (column, *self.format.aliases.get(column, ()))

    def to_sample(self, row: Mapping[str, Any]) -> Sample:
        """Turn one row into a conversation, or into plain text for the format ``text``.

        Raises:
            BadRowError: the row does not hold what the format needs.
        """
        for column in MEDIA:
            if not is_empty(row.get(column)):
                raise BadRowError(f"column {column} has content, and only text can be trained")
        names = self._read(row)
        try:
            sample = self.format.to_sample({ours: row.get(name) for ours, name in names.items()})
        except BadRowError as error:  # in the file's words
            reason = re.sub(r"^column (\w+)", lambda found: f"column {names.get(found[1], found[1])}", str(error))
            raise BadRowError(reason) from None
        if isinstance(sample, Conversation) and not any(message["role"] == "assistant" for message in sample.messages):
            raise BadRowError("no turn is the assistant's, so there is nothing to learn")
        return sample

    def unread(self, row: Mapping[str, Any]) -> set[str]:
        """Return the columns of ``row`` that hold something and that the format does not read."""
        read = set(self._read(row).values())
        return {column for column, value in row.items() if column not in read and not is_empty(value)}

    def drops_nulls(self, row: Mapping[str, Any]) -> bool:
        """Whether arguments of calls or schemas of tools lose keys of ``row``, because these are null."""
        return any(holds_nulls(row.get(name)) for name in self._read(row).values())

    def _read(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Return which of the row's columns is read for each of the format's."""
        names = {ours: self.names(ours) for ours in self.format.columns}
        return {
            ours: max(mine, key=lambda name: (row.get(name) is not None, name in row)) for ours, mine in names.items()
        }


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: null, NaN, an empty text or list. A 0 and a false are something."""
    return is_nothing(value) or (isinstance(value, str | list | dict) and not value)


def _text(values: dict[str, Any], column: str) -> str:
    value = values.get(column)
    if not isinstance(value, str):
        raise BadRowError(f"column {column} must be text, found {describe(value)}")
    return value


def _conversation(values: dict[str, Any], turns: list[Turn]) -> Conversation:
    """Put the ``system`` column before the turns, and the ``tools`` beside them."""
    if not is_empty(values.get("system")):
        system = _text(values, "system")
        first = turns[0][0]
        if first["role"] not in ("system", "developer"):
            turns = [({"role": "system", "content": system}, False), *turns]
        elif first["content"] != system:
            raise BadRowError(f"column system and the first turn are two different system prompts, found {system!r}")
    untrained = {i for i, (message, trained) in enumerate(turns) if message["role"] == "assistant" and not trained}
    return Conversation(
        [message for message, _ in turns], read_tools(values.get("tools")), untrained=frozenset(untrained)
    )


def _asked(question: str, answer: str) -> list[Turn]:
    return [({"role": "user", "content": question}, False), ({"role": "assistant", "content": answer}, True)]


def _from_alpaca(values: dict[str, Any]) -> Sample:
    turns = [turn for question, answer in _history(values.get("history")) for turn in _asked(question, answer)]
    parts = [_text(values, "instruction")]
    if not is_empty(values.get("input")):
        parts.append(_input(values))
    return _conversation(values, turns + _asked("\n\n".join(part for part in parts if part), _text(values, "output")))


def _input(values: dict[str, Any]) -> str:
    """Return the input as text; a number, true and false are written as JSON writes them."""
    value = values["input"]
    return json.dumps(value) if isinstance(value, bool | int | float) else _text(values, "input")


def _history(value: object) -> list[tuple[str, str]]:
    if is_empty(value):
        return []
    rounds = parse_json(value, "column history") if isinstance(value, str) else value
    if not isinstance(rounds, list) or not all(_is_round(pair) for pair in rounds):
        raise BadRowError(f"column history must be a list of [question, answer], found {describe(value)}")
    return [(question, answer) for question, answer in rounds]


def _is_round(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _from_prompt_completion(values: dict[str, Any]) -> Sample:
    """Read texts, or lists of messages; of these only the completion's answers carry loss."""
    prompt = [(message, False) for message, _ in _side(values, "prompt", "user")]
    completion = _side(values, "completion", "assistant")
    if prompt == [(message, False) for message, _ in completion[: len(prompt)]]:
        raise BadRowError(
            "the completion begins with the prompt, which the model would see twice; set data.format=chat"
        )
    if not any(message["role"] == "assistant" for message, _ in completion):
        raise BadRowError("no turn of the completion is the assistant's, so there is nothing to learn")
    return _conversation(values, prompt + completion)


def _side(values: dict[str, Any], column: str, role: str) -> list[Turn]:
    if isinstance(values.get(column), list) or _is_json_of_messages(values.get(column)):
        return [_chat_turn(turn) for turn in _turns(values, column)]
    return [({"role": role, "content": _text(values, column)}, True)]


def _is_json_of_messages(value: object) -> bool:
    """Whether a text is a list of messages as CSV files hold them, rather than one to be read as it is."""
    if not isinstance(value, str) or value.strip()[:1] != "[":
        return False
    with suppress(ValueError, RecursionError):
        turns = json.loads(value)
        return bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return re.match(r"\s*\[\s*\{'(role|content)': ", value) is not None  # as Python writes them, which is a bad row


def _from_text(values: dict[str, Any]) -> Sample:
    return _text(values, "text")


def _turns(values: dict[str, Any], column: str) -> list[dict[str, Any]]:
    value = values.get(column)
    turns = parse_json(value, f"column {column}") if isinstance(value, str) and value.strip()[:1] == "[" else value
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"column {column} must be a list of turns, found {describe(turns or None)}")
    return turns


def _from_chat(values: dict[str, Any]) -> Sample:
    return _conversation(values, [_chat_turn(turn) for turn in _turns(values, "messages")])


def read_messages(turns: list[dict[str, Any]]) -> list[Message]:
    """Return the messages of a conversation, as they are of chat data; :class:`BadRowError` where one is none."""
    return [_chat_turn(turn)[0] for turn in turns]


def _chat_turn(turn: dict[str, Any]) -> Turn:
    if not isinstance(turn.get("role"), str):
        raise BadRowError(f"a message must have a role, found {', '.join(map(str, turn)) or 'an empty one'}")
    speaker = turn["role"].strip().lower()
    known = {**SPEAKERS, "observation": "observation", "function": "tool"}  # some templates know the first word
    role = known.get(speaker, speaker)
    return read_turn(turn, speaker, role)


def _from_sharegpt(values: dict[str, Any]) -> Sample:
    return _conversation(values, [_sharegpt_turn(turn) for turn in _turns(values, "conversations")])


def _sharegpt_turn(turn: dict[str, Any]) -> Turn:
    speaker = turn["role"] if turn.get("from") is None and "role" in turn else turn.get("from")
    known = speaker.strip().lower() if isinstance(speaker, str) else ""
    if known not in SPEAKERS:
        raise BadRowError(f"a turn's speaker must be one of {', '.join(SPEAKERS)}, found {speaker!r}")
    content = turn["content"] if turn.get("value") is None and "content" in turn else turn.get("value")
    if turn.get("content") not in (None, "", content):
        raise BadRowError(f"a turn has another text as content than as value, found {describe(turn['content'])}")
    role = turn.get("role")  # which may be a persona's name
    if isinstance(role, str) and SPEAKERS.get(role.strip().lower(), SPEAKERS[known]) != SPEAKERS[known]:
        raise BadRowError(f"a turn has another speaker as role than as from, found {describe(role)}")
    rest = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return read_turn({**rest, "content": content}, known, SPEAKERS[known])


FORMATS = {
    known.name: known
    for known in (
        Format("chat", ("messages",), ("system", "tools"), _from_chat, FUNCTIONS),
        Format("sharegpt", ("conversations",), ("system", "tools"), _from_sharegpt, FUNCTIONS),
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
        Format(
            "prompt_completion",
            ("prompt", "completion"),
            ("system", "tools"),
            _from_prompt_completion,
            {"prompt": ("question",), "completion": ("answer",), **FUNCTIONS},
        ),
        Format("text", ("text",), (), _from_text),
    )
}


def choose_format(name: str, columns: dict[str, str], first: Mapping[str, Any]) -> RowFormat:
    """Return the format named ``name``, or for ``auto`` the first one whose columns the first row has.

    Args:
        name: ``data.format``.
        columns: ``data.columns``: the format's column -> the file's column.
        first: the first row.

    Raises:
        UserError: no format fits, or ``columns`` names a column that the format or the file does not have; or, for
            ``auto``, the columns are those of preferences.
    """
    found = list(first)
    for ours, theirs in columns.items():
        if theirs not in found:
            have = ", ".join(found)
            raise UserError(
                f"data.columns.{ours}={theirs}: no such column, the data have {have}{nearest(theirs, found)}"
            )
    chosen = _detect(columns, first) if name == "auto" else RowFormat(FORMATS[name], columns)
    known = chosen.format.columns
    for ours in columns:
        if ours not in known:
            raise UserError(
                f"data.columns.{ours}: format {chosen.name} has the columns {', '.join(known)}{nearest(ours, known)}"
            )
    missing = [column for column in chosen.format.required if not set(chosen.names(column)) & set(found)]
    if missing:
        raise UserError(
            f"data.format={chosen.name}: needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}, "
            f"the data have {', '.join(found)}; name them with data.columns={{{missing[0]}: ...}}"
        )
    return chosen


def _detect(columns: dict[str, str], first: Mapping[str, Any]) -> RowFormat:
    have = ", ".join(map(str, first))
    preferences = [column for column in PREFERENCES if column in first and column not in columns.values()]
    # Whether the answer is a wanted one, not the class of a text; beside a completion it may be a number or a text.
    label = None if "label" in columns.values() else first.get("label")
    if (isinstance(label, bool) and "text" not in first) or ("completion" in first and str(label).lower() in TRUTHS):
        preferences.append("label")
    if preferences:
        raise UserError(
            f"data.format=auto: column {preferences[0]} belongs to preferences, which are not supported (the data have "
            f"{have}); to train on one of the columns' answers set data.format, and data.columns to name them"
        )
    for known in FORMATS.values():
        candidate = RowFormat(known, columns)
        if all(set(candidate.names(column)) & set(first) for column in known.required):
            return candidate
    needs = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS.values())
    raise UserError(
        f"data.format=auto: no format fits the columns {have} (needed are {needs}); "
        f"set data.format, and data.columns to rename"
    )
