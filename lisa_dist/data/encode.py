"""Samples to tokens and labels: the loss falls on answers, and on the token that ends an answer's turn.

Stock chat templates seldom mark what the model has to produce, so the answers are found by rendering: the text
of the first i messages, closed by the template's own opening of an answer, is where answer i begins in the text
of the whole conversation. Characters become tokens by the tokenizer's offsets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.formats import BadRowError, Message, Sample
from lisa_dist.data.tokenizer import adds_bos, render

UNTRAINED = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Encoded:
    """One sample: ``input_ids`` and ``labels``, both int32 of shape [tokens]; labels unshifted, -100 untrained."""

    input_ids: np.ndarray
    labels: np.ndarray
    cut: bool = False  # whether the sample was longer

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != UNTRAINED).sum())


class Encoder:
    """Encodes samples with one tokenizer and one set of options; holds what it found out about the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, train_on_prompt: bool = False) -> None:
        """Prepare to encode.

        Args:
            tokenizer: with a chat template, unless only plain text is encoded.
            sequence_length: tokens that a sample may have; the rest is cut off at the right.
            train_on_prompt: train every token.
        """
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.train_on_prompt = train_on_prompt
        self._adds_bos = adds_bos(tokenizer)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special += [token for token in tokenizer.all_special_tokens if token not in special]
        by_length = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, by_length))) if by_length else None

    def encode(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            BadRowError: the chat template refuses the messages.
        """
        if isinstance(sample, str):
            ids, trained = self._encode_text(sample)
        else:
            try:
                ids, trained = self._encode_messages(sample.messages)
            except (TemplateError, TypeError, ValueError) as error:  # templates add and compare what they find
                raise BadRowError(f"the chat template refuses the messages ({error})") from error
        input_ids = np.asarray(ids[: self.sequence_length], dtype=np.int32)
        mask = np.asarray(trained[: self.sequence_length], dtype=bool)
        if self.train_on_prompt:
            mask[:] = True
        mask[:1] = False  # nothing comes before the first token, so it is never predicted
        labels = np.where(mask, input_ids, UNTRAINED).astype(np.int32)
        return Encoded(input_ids, labels, cut=len(ids) > self.sequence_length)

    def _encode_text(self, text: str) -> tuple[list[int], list[bool]]:
        bos = [self.tokenizer.bos_token_id] if self._adds_bos else []
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            return [], []
        ids = [*bos, *ids, self.tokenizer.eos_token_id]
        return ids, [True] * len(ids)

    def _encode_messages(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        text = render(self.tokenizer, messages)
        spans, ended = self.answer_spans(messages, text)
        ids, trained = self._mark_tokens(text, spans)
        if not ended:
            ids.append(self.tokenizer.eos_token_id)
            trained.append(True)
        return ids, trained

    def answer_spans(self, messages: list[Message], text: str) -> tuple[list[tuple[int, int]], bool]:
        """Return the character spans of the answers in ``text``, the rendered ``messages``, in order.

        A span begins with the answer's content and ends with the special token that ends its turn. The second
        value is False where the last message is an answer that no special token ends.
        """
        prefixes: dict[tuple[int, bool], str | None] = {}

        def length_of(count: int, prompt: bool) -> int | None:
            """Characters that the first ``count`` messages take up in ``text``; None where they render otherwise."""
            if count == 0:
                return 0
            if (count, prompt) not in prefixes:
                prefixes[count, prompt] = self._render_prefix(messages[:count], prompt)
            prefix = prefixes[count, prompt]
            return len(prefix) if prefix is not None and text.startswith(prefix) else None

        spans: list[tuple[int, int]] = []
        cursor, ended = 0, True
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = next((n for p in (True, False) if (n := length_of(index, p)) is not None), cursor)
            # Some templates render an answer otherwise once a question follows; the next agreeing prefix bounds it.
            following = (length_of(count, False) for count in range(index + 1, len(messages)))
            bound = next((length for length in following if length is not None), len(text))
            start, end, ended = self._content_span(text, message, max(begin, cursor), bound)
            spans.append((start, end))
            cursor = end
        return spans, ended or messages[-1]["role"] != "assistant"

    def _render_prefix(self, messages: list[Message], prompt: bool) -> str | None:
        try:
            return render(self.tokenizer, messages, prompt=prompt)
        except (
            TemplateError,
            TypeError,
            ValueError,
        ):  # some templates refuse a conversation that is empty or ends in a system message
            return None

    def _content_span(self, text: str, message: Message, begin: int, bound: int) -> tuple[int, int, bool]:
        """Return where the answer within ``text[begin:bound]`` starts and ends, and whether a special token ends it."""
        content = message["content"] if not message.get("tool_calls") else ""
        start = text.find(content, begin, bound) if content else -1
        if start < 0 and content.strip():  # many templates trim
            content = content.strip()
            start = text.find(content, begin, bound)
        if self._special is None:
            return max(start, begin), bound, False
        if start < 0:  # a tool call, or content that the template rewrote: the whole turn
            ends = [match.end() for match in self._special.finditer(text, begin, bound)]
            return begin, ends[-1] if ends else bound, bool(ends)
        match = self._special.search(text, start + len(content), bound)
        return start, match.end() if match else bound, match is not None

    def _mark_tokens(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:
            return self._mark_tokens_by_prefix(text, spans)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoding.offset_mapping, dtype=np.int64).reshape(-1, 2)
        first, last = offsets.min(axis=1), offsets.max(axis=1)  # where offsets are trimmed, a blank token's are empty
        trained = np.zeros(len(offsets), dtype=bool)
        for start, end in spans:
            trained |= (last > start) & (first < end)  # a token that reaches into an answer belongs to it
        return encoding.input_ids, trained.tolist()

    def _mark_tokens_by_prefix(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Mark without offsets: a span begins where the tokens of the text before it cease to be those of the whole."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids

        def tokens_before(character: int) -> int:
            prefix = self.tokenizer(text[:character], add_special_tokens=False).input_ids
            agreeing = [mine == whole for mine, whole in zip(prefix, ids)]
            return agreeing.index(False) if False in agreeing else len(agreeing)

        trained = [False] * len(ids)
        for start, end in spans:
            first, last = tokens_before(start), tokens_before(end)
            trained[first:last] = [True] * (last - first)
        return ids, trained
