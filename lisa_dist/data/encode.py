"""Samples to tokens and labels: the loss falls on answers, and on the token that ends an answer's turn.

Where the answers stand in the rendered text is found in :mod:`lisa_dist.data.spans`. Characters become tokens by the
tokenizer's offsets.
"""

from __future__ import annotations

import datetime
import itertools
import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lisa_dist.data.formats import BadRowError, Conversation, Sample
from lisa_dist.data.spans import AnswerFinder
from lisa_dist.data.tokenizer import adds_bos

UNTRAINED = -100  # the label of a token that carries no loss
STRANGE = "\ue000"  # a character that only tokenizers know that know all of them, by their bytes


@dataclass(frozen=True)
class Encoded:
    """One sample: ``input_ids`` and ``labels``, both int32 of shape [tokens]; labels unshifted, -100 untrained."""

    input_ids: np.ndarray
    labels: np.ndarray
    cut: bool = False  # whether the sample was longer
    unknown: int = 0  # characters that the tokenizer leaves out or makes its unknown token of

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != UNTRAINED).sum())


class Encoder:
    """Encodes samples with one tokenizer and one set of options; holds what it found out about the tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        train_on_prompt: bool = False,
        date: datetime.date | None = None,
    ) -> None:
        """Encode samples cut at the right to ``sequence_length`` tokens; ``train_on_prompt`` trains every token.

        ``tokenizer`` has a chat template, unless only plain text is encoded. ``date``: see ``tokenizer.render``.
        """
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.train_on_prompt = train_on_prompt
        self._adds_bos = adds_bos(tokenizer)
        self._knows_all = STRANGE in str(tokenizer.decode(tokenizer(STRANGE, add_special_tokens=False).input_ids))
        self._added = np.asarray(list(tokenizer.added_tokens_decoder), dtype=np.int64)
        control = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), reverse=True)
        # By their first letters, else each of a thousand is tried wherever one could begin.
        alike = ("|".join(map(re.escape, words)) for _, words in itertools.groupby(control, lambda word: word[:2]))
        self._control = re.compile("|".join(f"(?:{words})" for words in alike) or r"(?!)")
        self._finder = AnswerFinder(tokenizer, date)

    @property
    def rendered(self) -> dict[str, str]:
        """What the chat template makes of fields, see :class:`AnswerFinder`."""
        return self._finder.rendered

    def encode(self, sample: Sample) -> Encoded:
        """Encode one sample.

        Raises:
            BadRowError: the chat template refuses the messages, leaves one out, or does not show where an answer is.
        """
        if isinstance(sample, str):
            text = sample
            ids, trained = self._encode_text(text)
        else:
            text, ids, trained = self._encode_conversation(sample)
        input_ids = np.asarray(ids[: self.sequence_length], dtype=np.int32)
        mask = np.asarray(trained[: self.sequence_length], dtype=bool)
        mask[:1] = False  # nothing comes before the first token, so it is never predicted
        labels = np.where(mask, input_ids, UNTRAINED).astype(np.int32)
        unknown = 0 if self._knows_all else self._count_unknown(text)
        return Encoded(input_ids, labels, len(ids) > self.sequence_length, unknown)

    def control_words(self, conversation: Conversation) -> set[str]:
        """Return the control tokens that the messages hold as text, of which the tokenizer makes headers and ends."""
        return {word for message in conversation.messages for word in self._control.findall(str(message))}

    def _count_unknown(self, text: str) -> int:
        """Count the characters of a text, other than blanks, that are in no token but the unknown one."""
        unknown = self.tokenizer.unk_token_id
        if not self.tokenizer.is_fast:
            return self.tokenizer(text, add_special_tokens=False).input_ids.count(unknown)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        known = np.zeros(len(text), dtype=bool)
        # The last token of a place counts: a blank that is put before a text has the place of its first character.
        for token, (first, last) in zip(encoding.input_ids, encoding.offset_mapping):
            known[first:last] = token != unknown or text[first:last] == self.tokenizer.unk_token
        return sum(not text[place].isspace() for place in np.flatnonzero(~known).tolist())

    def _encode_text(self, text: str) -> tuple[list[int], list[bool]]:
        """Begin with BOS where the tokenizer does so, end with EOS; a text that has them already gets no second one."""
        check_is_text(text)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            return [], []
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if self._adds_bos and not text.lstrip().startswith(bos):
            ids = [self.tokenizer.bos_token_id, *ids]
        if not text.rstrip().endswith(eos):
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids, [True] * len(ids)

    def _encode_conversation(self, conversation: Conversation) -> tuple[str, list[int], list[bool]]:
        answers = self._finder.find(conversation)
        check_is_text(answers.text)
        untrained = [span for index, span in answers.spans.items() if index in conversation.untrained]
        if self.train_on_prompt:
            ids, left_out = self._mark_tokens(answers.text, untrained)
            trained = [not mark for mark in left_out]
        else:
            spans = [span for index, span in answers.spans.items() if index not in conversation.untrained]
            ids, trained = self._mark_tokens(answers.text, spans)
        if not answers.ended:
            ids.append(self.tokenizer.eos_token_id)
            trained.append(len(conversation.messages) - 1 not in conversation.untrained)
        return answers.text, ids, trained

    def _mark_tokens(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:
            return self._mark_tokens_by_prefix(text, spans)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(encoding.offset_mapping, dtype=np.int64).reshape(-1, 2)
        first, last = offsets.min(axis=1), offsets.max(axis=1)  # where offsets are trimmed, a blank token's are empty
        added = np.isin(encoding.input_ids, self._added)  # they may take the blanks around them in, as Phi 3's do
        trained = np.zeros(len(offsets), dtype=bool)
        for start, end in spans:
            # A token that reaches into an answer belongs to it; a header that ate the answer's first blanks does not.
            trained |= (last > start) & (first < end) & ~(added & (first < start))
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


def check_is_text(text: str) -> None:
    """Raise :class:`BadRowError` for half of a character, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadRowError(f"its text holds half of a character ({half} in JSON), as where it was cut") from None
