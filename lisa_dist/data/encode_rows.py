"""From the rows of a source to tokens, in parallel and with a bar, and the count of what became of them.

Rows are encoded in chunks of one size, each by an encoder of its own: results do not depend on how many processes
there are, nor on which of them had which rows.
"""

from __future__ import annotations

import datetime
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data.encode import Encoded, Encoder
from lisa_dist.data.first_row import bad_row
from lisa_dist.data.formats import BadRowError, Conversation, RowFormat, choose_format
from lisa_dist.data.readers import BrokenRow, Row
from lisa_dist.data.sources import Source
from lisa_dist.data.tokenizer import ensure_chat_template, writes_day
from lisa_dist.data.workers import WorkerDiedError, map_in_order

logger = logging.getLogger(__name__)

ROWS_A_CHUNK = 250
CHUNKS_BEFORE_WORKERS = 8  # a small data set starts none
BAD_ROWS_SHOWN = 3
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
LEAST_TRAINED_SHARE = 0.01  # below this a warning
REASONS = 20  # counted apart
OTHER_REASONS = "for other reasons"
ANSWER_KEYS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")


@dataclass
class DataCounts:
    """What became of the rows of one file or split."""

    read: int = 0
    used: int = 0  # rows with a trained token
    cut: int = 0  # rows that are used, but cut at the right to data.sequence_length
    left_out: dict[str, int] = field(default_factory=dict)  # rows that are not used, by reason
    tokens: int = 0
    trained_tokens: int = 0
    empty_answers: int = 0
    with_nulls: int = 0  # rows whose tool calls or tools lost keys that are null
    with_control_words: int = 0  # rows whose messages hold control tokens as text
    control_words: list[str] = field(default_factory=list)  # which
    unknown_characters: int = 0  # of which the tokenizer makes nothing, or its unknown token
    unread_columns: list[str] = field(default_factory=list)  # columns with content that the format does not read
    date: str | None = None  # that the chat template writes into rows as today's
    not_rendered: list[str] = field(default_factory=list)  # what the chat template leaves out, a sentence each

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def rows(self) -> dict[str, Any]:
        """``rows`` of summary.json."""
        return {"read": self.read, "used": self.used, "cut": self.cut, "left_out": self.left_out}

    def leave_out(self, reason: str) -> None:
        """Count a row that is not used."""
        if reason not in self.left_out and len(self.left_out) >= REASONS:
            reason = OTHER_REASONS
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def describe(self) -> str:
        """Return in words what became of the rows."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        left_out = f", {sum(self.left_out.values())} left out ({reasons})" if reasons else ""
        return f"{self.read} read, {self.used} used, {self.cut} of them cut{left_out}"

    def warnings(self) -> list[str]:
        """Return what is likely not meant, a sentence each."""
        found = []
        if self.left_out or self.cut:
            found.append(f"rows: {self.describe()}")
        if self.unread_columns:
            found.append(f"nothing reads column{'s' * (len(self.unread_columns) > 1)} {', '.join(self.unread_columns)}")
        found += self.not_rendered
        if self.empty_answers:
            found.append(f"empty answers: {self.empty_answers}, of which only the end is trained")
        if self.with_nulls:
            found.append(
                f"keys that are null are left out of tool calls' arguments and of tools in {self.with_nulls} rows; "
                f"where a null is meant, give arguments and tools as JSON text"
            )
        if self.with_control_words:
            found.append(
                f"messages of {self.with_control_words} rows hold {', '.join(self.control_words)}, which the tokenizer "
                f"takes for control tokens and not for text, so a turn may end or begin there; write them otherwise "
                f"where text is meant"
            )
        if self.unknown_characters:
            found.append(
                f"the tokenizer does not know {self.unknown_characters} of the characters, "
                f"so the model neither sees nor learns them"
            )
        if self.trained_share < LEAST_TRAINED_SHARE:
            found.append(f"only {self.trained_share:.2%} of the tokens are trained ({self.trained_tokens})")
        return found


@dataclass
class EncodedRow:
    """What became of one row."""

    place: str
    bad: str = ""  # why it can't be used
    encoded: Encoded | None = None
    unread: set[str] = field(default_factory=set)  # columns
    empty_answers: int = 0
    with_nulls: bool = False
    control_words: set[str] = field(default_factory=set)


@dataclass
class RowReader:
    """Goes through a source's rows once, finds their format, and counts what becomes of them."""

    config: DataConfig
    source: Source
    key: str  # that named the source, for messages
    limit: int | None  # rows to read
    format: RowFormat | None = None
    counts: DataCounts = field(default_factory=DataCounts)
    rendered: dict[str, str] = field(default_factory=dict)  # see AnswerFinder
    failure: UserError | None = None  # of reading, to be raised when all that came before is counted

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Encoded]]:
        """Yield the rows that have a trained token, as tokens, a chunk at a time.

        Raises:
            UserError: a row is bad and ``data.on_bad_row=error``, or a file is broken as a whole.
        """
        rows = islice(self.source.rows(), self.limit)
        first = self._first_whole(rows)
        if first is None:
            return
        chosen = self.format = choose_format(self.config.format, self.config.columns, first.values)
        if chosen.name != "text":
            ensure_chat_template(tokenizer)
            if writes_day(tokenizer):  # one day for all rows and processes, whenever midnight comes
                self.counts.date = self.config.date or datetime.date.today().isoformat()
        date = None if self.counts.date is None else datetime.date.fromisoformat(self.counts.date)

        def encode(chunk: list[Row | BrokenRow]) -> tuple[list[EncodedRow], dict[str, str]]:
            encoder = Encoder(tokenizer, self.config.sequence_length, self.config.train_on_prompt, date)
            return encode_chunk(chunk, chosen, encoder)

        num_proc = self.config.num_processes
        mapped = map_in_order(encode, self._chunks(chain([first], rows)), num_proc, CHUNKS_BEFORE_WORKERS)
        try:
            with closing(mapped), row_progress(self.source.name, self._total()) as advance:
                for done, rendered in mapped:
                    self.rendered |= {name: text for name, text in rendered.items() if name not in self.rendered}
                    yield [row.encoded for row in done if self._count(row) and row.encoded is not None]
                    advance(len(done))
        except WorkerDiedError as error:
            raise UserError(f"data.num_proc={num_proc}: while tokenizing {error}; set it lower") from error
        if self.failure is not None:
            raise self.failure
        self.counts.not_rendered = [sentence for sentence in self.rendered.values() if sentence]

    def _chunks(self, rows: Iterator[Row | BrokenRow]) -> Iterator[list[Row | BrokenRow]]:
        chunk: list[Row | BrokenRow] = []
        try:
            for row in rows:
                chunk.append(row)
                if len(chunk) == ROWS_A_CHUNK:
                    yield chunk
                    chunk = []
        except UserError as error:
            self.failure = error
        if chunk:
            yield chunk

    def _total(self) -> int | None:
        total = self.source.count_rows()
        return total if total is None or self.limit is None else min(total, self.limit)

    def _first_whole(self, rows: Iterator[Row | BrokenRow]) -> Row | None:
        for row in rows:
            if isinstance(row, Row):
                return row
            self._count(EncodedRow(row.place, row.reason))
        return None

    def _count(self, row: EncodedRow) -> bool:
        """Count a row, and return whether it is used."""
        counts = self.counts
        counts.read += 1
        if row.encoded is None:
            self._bad(row.place, row.bad)
            return False
        counts.unread_columns += sorted(row.unread.difference(counts.unread_columns))
        if not row.encoded.trained_tokens:
            within = f" within data.sequence_length={self.config.sequence_length}" if row.encoded.cut else ""
            counts.leave_out(f"without a trained token{within}")
            return False
        counts.used += 1
        counts.cut += row.encoded.cut
        counts.tokens += len(row.encoded.input_ids)
        counts.trained_tokens += row.encoded.trained_tokens
        counts.empty_answers += row.empty_answers
        counts.with_nulls += row.with_nulls
        counts.with_control_words += bool(row.control_words)
        counts.control_words += sorted(row.control_words.difference(counts.control_words))
        counts.unknown_characters += row.encoded.unknown
        return True

    def _bad(self, place: str, reason: str) -> None:
        if self.config.on_bad_row == "error":
            raise bad_row(self.key, self.source.name, place, reason)
        kind = re.split(r", found | \(|; ", reason)[0]  # what follows is of this row alone
        self.counts.leave_out(f"bad: {kind}")
        if sum(count for why, count in self.counts.left_out.items() if why.startswith("bad: ")) <= BAD_ROWS_SHOWN:
            logger.warning("skipped %s: %s", place, reason)


def encode_chunk(
    chunk: list[Row | BrokenRow], chosen: RowFormat, encoder: Encoder
) -> tuple[list[EncodedRow], dict[str, str]]:
    """Return what became of a chunk's rows, and what its own encoder found out of the chat template (AnswerFinder)."""
    return [_encode_row(row, chosen, encoder) for row in chunk], encoder.rendered


def _encode_row(row: Row | BrokenRow, chosen: RowFormat, encoder: Encoder) -> EncodedRow:
    if isinstance(row, BrokenRow):
        return EncodedRow(row.place, row.reason)
    try:
        sample = chosen.to_sample(row.values)
        encoded = encoder.encode(sample)
    except BadRowError as error:
        return EncodedRow(row.place, str(error))
    found = EncodedRow(row.place, "", encoded, chosen.unread(row.values))
    if isinstance(sample, Conversation):
        found.empty_answers, found.control_words = _empty_answers(sample), encoder.control_words(sample)
        found.with_nulls = chosen.drops_nulls(row.values)
    return found


def _empty_answers(sample: Conversation) -> int:
    """Count the trained answers that say nothing: no text, no call, no thought."""
    return sum(
        message["role"] == "assistant"
        and index not in sample.untrained
        and not any(str(message.get(key) or "").strip() for key in ANSWER_KEYS)
        for index, message in enumerate(sample.messages)
    )


@contextmanager
def row_progress(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` rows (None: not known) are done: a bar on a terminal, else a line every ten seconds.

    Yields the function to call with the number of further ones.
    """
    if not sys.stdout.isatty():
        yield _log_lines(name, total)
        return
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stdout)
    with Progress(TextColumn("tokenizing"), *columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda rows: bar.advance(task, rows)


def _log_lines(name: str, total: int | None) -> Callable[[int], None]:
    started = last = time.monotonic()
    done = 0

    def advance(rows: int) -> None:
        nonlocal last, done
        done += rows
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            of_all = "" if total is None else f" of {total}"
            logger.info("tokenized %d%s rows of %s, %.0f rows/s", done, of_all, name, done / (now - started))

    return advance
