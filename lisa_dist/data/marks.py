"""Marks: words put into the messages of a conversation, to see where a chat template puts what.

A mark is put before and after the text of a question, a system message or a tool's result, after an answer's text, and
after the name of every function that it calls. A template that renders marked messages otherwise than by the marks
alone (because it looks into a text) does so for single messages; those go without.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

from lisa_dist.data.formats import Message

Render = Callable[[list[Message]], str | None]  # None: the template refuses the messages


class Place(Enum):
    """Where in a message a mark is."""

    START = "start of its text"
    END = "end of its text"
    CALL = "name of a function"


@dataclass(frozen=True)
class Mark:
    """A word that occurs nowhere else, and where it was put."""

    word: str
    message: int
    place: Place


class Marks:
    """The marked messages of a conversation, and the characters of its rendering at which the marks come to stand."""

    def __init__(self, messages: list[Message], whole: str, render: Render) -> None:
        """Put the marks in and find them; ``whole`` is what ``render`` made of the messages without marks."""
        self.messages = messages
        # Letters and digits pass through JSON, trimming and the like unchanged.
        stem = next(stem for n in count(1) if (stem := "zq" * n) not in whole)
        self.pattern = re.compile(stem + r"\d+mk")
        self.free_word = stem + "mk"  # one more word, for messages that are put in
        self.marks: list[Mark] = []
        self.marked = [self._mark(index, stem) for index in range(len(messages))]
        self.of_message: dict[int, list[Mark]] = {}
        for mark in self.marks:
            self.of_message.setdefault(mark.message, []).append(mark)
        self.places: dict[str, list[int]] = {}  # by word; a template may repeat it
        self.known: set[int] = set()  # the messages whose marks change nothing else
        self.all_known = self._find(self.marked, set(range(len(messages))), whole, render)
        if not self.all_known:
            for index in range(len(messages)):
                self._find(self.with_marks_in(index), {index}, whole, render)

    def with_marks_in(self, index: int) -> list[Message]:
        """Return the messages with the marks of message ``index``, and those of all others where that does no harm."""
        if self.all_known:
            return self.marked
        return [*self.messages[:index], self.marked[index], *self.messages[index + 1 :]]

    def of(self, index: int) -> list[Mark]:
        """Return the marks of a message."""
        return self.of_message.get(index, [])

    def lost(self) -> list[Mark]:
        """Return the marks of what the template leaves out."""
        return [mark for mark in self.marks if mark.message in self.known and mark.word not in self.places]

    def removed_from(self, text: str) -> str:
        """Return a text without marks."""
        return self.pattern.sub("", text)

    def rest_after(self, index: int, text: str) -> str | None:
        """Return what follows the last mark of message ``index`` in a text, without marks; None where it has none."""
        ends = [place + len(mark.word) for mark in self.of(index) if (place := text.find(mark.word)) >= 0]
        return self.removed_from(text[max(ends) :]) if ends else None

    def _mark(self, index: int, stem: str) -> Message:
        message = dict(self.messages[index])
        calls = message.get("tool_calls") or []

        def new(place: Place) -> str:
            self.marks.append(Mark(f"{stem}{len(self.marks)}mk", index, place))
            return self.marks[-1].word

        if message["role"] != "assistant":
            if text_of(message["content"]).strip():
                message["content"] = insert(message["content"], new(Place.START), at_end=False)
                message["content"] = insert(message["content"], new(Place.END), at_end=True)
            return message
        if text_of(message["content"]).strip() or not calls:
            message["content"] = insert(message["content"], new(Place.END), at_end=True)
        if calls:
            message["tool_calls"] = [_with_name_mark(call, new) for call in calls]
        return message

    def _find(self, messages: list[Message], indexes: set[int], whole: str, render: Render) -> bool:
        """Find the marks of ``indexes`` in the rendering of ``messages``; False where they change more than that."""
        text = render(messages)
        if text is None or self.removed_from(text) != whole:
            return False
        self.known |= indexes
        removed = 0
        for match in self.pattern.finditer(text):
            self.places.setdefault(match.group(), []).append(match.start() - removed)
            removed += len(match.group())
        return True


def text_of(content: Any) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else ""


def insert(content: Any, word: str, at_end: bool) -> Any:
    """Put a word into a content, inside of the blanks around it, which templates may trim."""
    if isinstance(content, list):
        texts = [index for index, part in enumerate(content) if isinstance(part.get("text"), str)]
        if not texts:
            return content
        order = list(reversed(texts)) if at_end else texts
        chosen = next((index for index in order if content[index]["text"].strip()), order[0])
        part = {**content[chosen], "text": insert(content[chosen]["text"], word, at_end)}
        return [*content[:chosen], part, *content[chosen + 1 :]]
    if not isinstance(content, str):
        return content
    place = len(content.rstrip()) if at_end else len(content) - len(content.lstrip())
    return content[:place] + word + content[place:]


def _with_name_mark(call: dict[str, Any], new: Callable[[Place], str]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {**call, "function": {**function, "name": function["name"] + new(Place.CALL)}}
    return call
