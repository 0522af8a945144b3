"""Where the answers of a conversation stand in its rendering: what the model has to produce, and nothing else.

Stock chat templates seldom mark it, and many render a message in another way once others follow it, so it is found by
comparing renderings, never by looking for the answer's text:

- an answer begins where the prompt that is used to generate it ends: as far as that prompt and the whole agree;
- its turn ends where the whole and the messages up to it cease to agree, and the last special token before that ends
  it. Where the template gives turns no such token, the next header's (``<|user|>``) is what the model stops by.

Where renderings differ early (a thought that is left out once a question follows, a system message put into the last
question), they are compared from a place that both have, which marks in the messages show.

A prompt for every answer would take time quadratic in the turns. Where the template writes a constant to open an
answer, the first prompt shows what all others have behind a message of the same role, and the whole is compared with
that; where it does not agree, the answer's own prompt is rendered.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.formats import BadRowError, Conversation, Message
from lisa_dist.data.marks import Mark, Marks, Place, insert, text_of
from lisa_dist.data.template_texts import TemplateTexts, common_length, opens_by_a_constant
from lisa_dist.data.tokenizer import render
from lisa_dist.data.unrendered import Rendered, note_unrendered


@dataclass(frozen=True)
class Answers:
    """A rendered conversation and the characters of its answers, by their index among the messages."""

    text: str
    spans: dict[int, tuple[int, int]]
    ended: bool  # False: the last message is an answer, and nothing in the text ends it


class AnswerFinder:
    """Finds answers with one tokenizer and its chat template; remembers how that template ends turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: datetime.date | None = None) -> None:
        self.tokenizer = tokenizer
        self.date = date
        self.texts = TemplateTexts(tokenizer)
        self.turn_ends: dict[tuple[bool, str], tuple[int, bool]] = {}
        self.rendered: dict[str, str] = {}  # by field: "" where the template renders it, else a sentence that says no

    def find(self, conversation: Conversation) -> Answers:
        """Render a conversation and find its answers.

        Raises:
            BadRowError: the template refuses the messages, leaves one out, or does not show where an answer is.
        """
        try:
            search = _Search(self, conversation.messages, conversation.tools)
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses the messages ({error})") from error
        found = search.answers()
        if search.words_lost:
            self.rendered["words"] = "the chat template leaves out an answer's text where a tool call stands beside it"
        template = self.tokenizer.get_chat_template(tools=search.tools)
        asked = (search.messages, search.tools, search.whole, template, search.marks.free_word)
        note_unrendered(self.rendered, Rendered(*asked, self.render_or_none))
        return found

    def render_or_none(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool = False
    ) -> str | None:
        """Return what the template makes of messages, None where it refuses them."""
        try:
            return render(self.tokenizer, messages, tools=tools, prompt=prompt, date=self.date)
        except TemplateError:
            return None


class _Search:
    """The search in one conversation."""

    def __init__(
        self, finder: AnswerFinder, messages: list[Message], tools: list[dict[str, Any]] | None, prompt: bool = False
    ) -> None:
        self.finder = finder
        self.messages = messages
        self.tools = tools
        self.whole = self.render(messages, prompt)
        self.marks = Marks(messages, self.whole, lambda marked: self.render_or_none(marked, prompt))
        self.words_lost = False
        self.opens_alike = opens_by_a_constant(finder.tokenizer.get_chat_template(tools=tools))
        self.rests: dict[tuple[str, str], tuple[str | None, str | None]] = {}

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        return render(self.finder.tokenizer, messages, tools=self.tools, prompt=prompt, date=self.finder.date)

    def render_or_none(self, messages: list[Message], prompt: bool = False) -> str | None:
        return self.finder.render_or_none(messages, self.tools, prompt)

    def name(self, index: int) -> str:
        return f"message {index + 1} of {len(self.messages)} ({self.messages[index]['role']})"

    def answers(self) -> Answers:
        if self._left_out():
            return self._answers_behind_the_last_prompt()
        indexes = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        for index in sorted(set(indexes) - self.marks.known):  # an empty answer may be one that is not written at all
            if self.render_or_none([*self.messages[:index], *self.messages[index + 1 :]]) == self.whole:
                raise BadRowError(f"the chat template leaves out {self.name(index)}")
        begins = {index: self._begin(index) for index in indexes}
        spans: dict[int, tuple[int, int]] = {}
        reached, ended = 0, True
        for index in indexes:
            end, ended = self._end(index, begins)
            if not reached <= begins[index] <= end:
                raise BadRowError(f"the chat template does not show where {self.name(index)} begins and ends")
            spans[index] = (begins[index], end)
            reached = end
            self._refuse_others_within(index, begins[index], end)
        return Answers(self.whole, spans, ended or self.messages[-1]["role"] != "assistant")

    def _left_out(self) -> list[Mark]:
        """Return the marks of questions and system messages that are not rendered; refuse a row that loses answers."""
        left_out = []
        for mark in self.marks.lost():
            message = self.messages[mark.message]
            if mark.place is Place.CALL:
                raise BadRowError(f"the chat template leaves out a tool call of {self.name(mark.message)}")
            if message["role"] != "assistant":
                left_out.append(mark)
            elif message.get("tool_calls"):  # templates keep or drop the words beside a call by design
                self.words_lost = True
            elif text_of(message["content"]).strip():
                raise BadRowError(f"the chat template leaves out the content of {self.name(mark.message)}")
        return left_out

    def _answers_behind_the_last_prompt(self) -> Answers:
        """Put the last answer behind its prompt, where that has what the whole leaves out.

        Mistral's templates write the system message into a last question, and where an answer follows, nowhere.
        """
        last = len(self.messages) - 1
        lost = self._left_out()[0].message
        if self.messages[last]["role"] == "assistant":
            begin = self._begin(last)
            end, ended = self._end(last, {last: begin})
            before = _Search(self.finder, self.messages[:last], self.tools, prompt=True)
            if not before._left_out():
                found = before.answers()
                spans = {**found.spans, last: (len(found.text), len(found.text) + end - begin)}
                return Answers(found.text + self.whole[begin:], spans, ended)
        raise BadRowError(f"the chat template leaves out the content of {self.name(lost)}")

    def _refuse_others_within(self, index: int, begin: int, end: int) -> None:
        for mark in self.marks.marks:
            other = self.messages[mark.message]["role"] != "assistant"
            if other and any(begin < place < end for place in self.marks.places.get(mark.word, [])):
                raise BadRowError(f"the chat template puts {self.name(mark.message)} inside {self.name(index)}")

    # Where an answer begins

    def _begin(self, index: int) -> int:
        begin = self._begin_as_others(index)
        if begin is not None:
            return begin
        try:
            prompt = self.render(self.messages[:index], prompt=True)
        except TemplateError as error:
            if any(message["role"] == "user" for message in self.messages[:index]):
                raise BadRowError(f"the chat template gives no prompt for {self.name(index)} ({error})") from error
            return self._begin_unasked(index)
        if self.whole.startswith(prompt):
            return len(prompt)
        context = self.render_or_none(self.messages[:index]) or ""
        without_opening = context[: self.finder.texts.agreement(context, prompt)]
        if self.whole.startswith(without_opening):
            return self._past(prompt, 0)
        begin = self._begin_after_mark(index, *self._rests_before(index))
        if begin is None:
            raise BadRowError(
                f"the chat template renders what comes before {self.name(index)} otherwise once messages follow, "
                f"so it does not show where the answer begins"
            )
        return begin

    def _begin_as_others(self, index: int) -> int | None:
        """Where an answer begins by the prompt for an earlier one after the same role; None where it does not agree."""
        message = self.messages[index - 1]
        content = message.get("content")
        if not self.opens_alike or index == 0 or message["role"] == "assistant" or not isinstance(content, str):
            return None
        alike = (message["role"], content[len(content.rstrip()) :])  # a mark is put before the blanks at the end
        if alike not in self.rests:
            self.rests[alike] = self._rests_before(index)
        return self._begin_after_mark(index, *self.rests[alike])

    def _rests_before(self, index: int) -> tuple[str | None, str | None]:
        """Return what follows the mark of the message before an answer: in its prompt, and with no answer opened."""
        known = self.marks.with_marks_in(index - 1)[:index]
        prompt, context = self.render_or_none(known, prompt=True), self.render_or_none(known)
        return self.marks.rest_after(index - 1, prompt or ""), self.marks.rest_after(index - 1, context or "")

    def _begin_after_mark(self, index: int, prompt: str | None, context: str | None) -> int | None:
        """Compare a prompt and the whole from the message before the answer on."""
        places = [place for mark in self.marks.of(index - 1) for place in self.marks.places.get(mark.word, [])[:1]]
        if places and prompt is not None:
            agreed = self.finder.texts.agreement(prompt, self.whole[max(places) :])
            if agreed >= self.finder.texts.agreement(context or "", prompt):  # all that closes the message before
                return self._past(prompt, max(places))
        return None

    def _past(self, prompt: str, place: int) -> int:
        """Where the whole, from ``place`` on, ceases to agree with a prompt; blanks before its opening may differ."""
        agreed = self.finder.texts.agreement(prompt, self.whole[place:])
        end = place + agreed
        blanks = len(self.whole[end:]) - len(self.whole[end:].lstrip())
        opening = prompt[agreed:].strip()
        return end + blanks + len(opening) if opening and self.whole.startswith(opening, end + blanks) else end

    def _begin_unasked(self, index: int) -> int:
        """Where an answer begins that no question comes before: after the opening that answers to questions have."""
        question = [{"role": "user", "content": "a"}]
        prompt = self.render_or_none(question, prompt=True) or ""
        opening = prompt[self.finder.texts.agreement(prompt, self.render_or_none(question) or "") :]
        message, word = self.messages[index], self.marks.free_word
        message = {**message, "content": insert(message["content"], word, at_end=False)}
        text = self.render_or_none([*self.messages[:index], message, *self.messages[index + 1 :]])
        if text is None or word not in text:
            raise BadRowError(f"the chat template does not show where {self.name(index)} begins, no question precedes")
        begin = common_length(text.partition(word)[0], self.whole)
        found = self.whole.rfind(opening, 0, begin) if opening else -1
        return found + len(opening) if found >= 0 else begin

    # Where it ends

    def _end(self, index: int, begins: dict[int, int]) -> tuple[int, bool]:
        """Return where an answer ends, its end token included, and whether a token ends it."""
        begin = begins[index]
        firsts = [
            min(after)
            for mark in self.marks.of(index)
            if (after := [place for place in self.marks.places.get(mark.word, []) if place >= begin])
        ]
        start = max(firsts, default=begin)
        gap = self.whole[start : self._limit(index, start, begins)]
        plain = bool(firsts) and not self.messages[index].get("tool_calls")
        known = (index == len(self.messages) - 1, gap)
        if not plain or known not in self.finder.turn_ends:
            found = self._turn_end(index, bool(firsts), gap, begin)
            if not plain:
                return start + found[0], found[1]
            self.finder.turn_ends[known] = found
        length, ended = self.finder.turn_ends[known]
        return start + length, ended

    def _limit(self, index: int, start: int, begins: dict[int, int]) -> int:
        """Where the content of the next message begins, or the next answer, or the text ends."""
        for following in range(index + 1, len(self.messages)):
            if following in begins:
                return begins[following]
            places = [place for mark in self.marks.of(following) for place in self.marks.places.get(mark.word, [])]
            if any(place >= start for place in places):
                return min(place for place in places if place >= start)
        return len(self.whole)

    def _turn_end(self, index: int, is_marked: bool, gap: str, begin: int) -> tuple[int, bool]:
        """Return how much of ``gap``, the text after a place in the answer, is the answer's, and if a token ends it.

        The other rendering (the last answer with another message behind it, an earlier one with none) shows how much
        of the gap belongs to the turn itself.
        """
        last = index == len(self.messages) - 1
        special, bos = self.finder.texts.special, self.finder.tokenizer.bos_token
        if last and is_marked and len(special.findall(gap)) == 1:
            return next(special.finditer(gap)).end(), True
        other = self._with_a_message_behind(index) if last else self._with_none_behind(index, is_marked, begin)
        own = gap if other is None else gap[: self.finder.texts.agreement(gap, other)]
        if not last and self.messages[index + 1]["role"] == "assistant":
            # Its opening is the next answer's, also where the template writes one at the end of any text.
            behind = self._with_a_message_behind(index)
            own = own if behind is None else own[: self.finder.texts.agreement(own, behind)]
        rest = (gap if last else other or "")[len(own) :]  # what is written where no message follows
        if rest.strip() and not last and not is_marked and text_of(self.messages[index]["content"]).strip():
            raise BadRowError(f"the chat template renders {self.name(index)} otherwise once messages follow")
        ends = {match.end(): match.group() for match in special.finditer(own)}
        if rest.strip() or (other is None and not last):
            # Some templates open an answer at the end of any text; that opening begins as the first message's does.
            opener = next((token for token in special.findall(self.whole) if token != bos), None)
            before = list(takewhile(lambda end: ends[end] != opener, ends))
            ends = {end: ends[end] for end in before or list(ends)[:1]}
        if ends:
            return max(ends), True
        after = special.search(gap, len(own))
        if after is not None and after.group() != bos:
            return after.end(), True
        return (len(gap) if last else len(own)), False

    def _with_none_behind(self, index: int, is_marked: bool, begin: int) -> str | None:
        """What follows the place in answer ``index`` where it is the last message; None where the template refuses."""
        if is_marked:
            return self.marks.rest_after(index, self.render_or_none(self.marks.with_marks_in(index)[: index + 1]) or "")
        text = self.render_or_none(self.messages[: index + 1])
        if text is None or text[:begin] != self.whole[:begin]:
            return None
        return text[begin:]

    def _with_a_message_behind(self, index: int) -> str | None:
        """What follows the place in an answer up to the content of a message put after it; None where refused."""
        word = self.marks.free_word
        followers: list[Message] = [{"role": "user", "content": word}]
        for call in self.messages[index].get("tool_calls") or []:
            name = call.get("function", call).get("name")
            tool = {"role": "tool", "content": word, "name": name, "tool_call_id": call.get("id")}
            followers.insert(0, {key: value for key, value in tool.items() if value is not None})
        for follower in followers:
            text = self.render_or_none([*self.marks.with_marks_in(index)[: index + 1], follower])
            after = None if text is None else self.marks.rest_after(index, text)
            if after is not None and word in after:
                return after.partition(word)[0]
        return None
