"""Rows to tokens, once a machine, kept on disk: every rank maps the same Arrow file into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.data.counts import DataCounts
from lisa_dist.data.encode import Encoded, Encoder
from lisa_dist.data.formats import BadRowError, Conversation, Message, RowFormat, Sample, choose_format
from lisa_dist.data.readers import BrokenRow
from lisa_dist.data.sources import Source, find_source
from lisa_dist.data.tokenizer import FALLBACK_TEMPLATE, ensure_chat_template
from lisa_dist.runtime.distributed import gather_objects, local_rank_zero_first

logger = logging.getLogger(__name__)

CACHE_VERSION = 3  # to be raised when the same rows give other tokens
ANSWER_KEYS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
ROWS_A_BATCH = 1000
BAD_ROWS_SHOWN = 3
ROWS_A_REPORT = 50_000


@dataclass(frozen=True)
class TokenizedRows:
    """The rows of one file or split as tokens, memory-mapped from the cache."""

    rows: datasets.Dataset  # input_ids, labels: lists of int32; length: int32
    format: str
    counts: DataCounts


def tokenize(
    config: DataConfig,
    path: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.path",
    subset: str | None = None,
    limit: int | None = None,
) -> TokenizedRows:
    """Tokenize one file or split on the first rank of each machine; every rank maps the result. Collective: every rank.

    The cache is keyed by the content of the files, the tokenizer, and what of ``data.*`` changes the tokens.

    Raises:
        UserError: there are no rows, no rows with a trained token, or bad rows and ``data.on_bad_row=error``.
    """
    cache = local_path(config.cache_dir or "~/.cache/lisa_dist")
    folder: Path | None = None
    with local_rank_zero_first() as first:
        if first:
            source = find_source(path, split, key, subset)
            for note in source.notes:
                logger.warning("%s=%s: %s", key, path, note)
            folder = cache / _cache_key(config, source, tokenizer, limit)
            if not (folder / "counts.json").is_file():
                _tokenize_into(folder, config, source, tokenizer, key, limit)
    folders = {found.name for found in gather_objects(folder) if found is not None}
    if len(folders) != 1:
        raise UserError(f"{key}={path}: the files, or the tokenizer's, differ between the machines")
    tokenized = _load(cache / folders.pop(), tokenizer)
    for warning in tokenized.counts.warnings():
        logger.warning("%s=%s: %s", key, path, warning)
    return tokenized


def _load(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    summary = json.loads((folder / "counts.json").read_text())
    chosen = summary.pop("format")
    if chosen != "text":
        ensure_chat_template(tokenizer)
    return TokenizedRows(datasets.Dataset.from_file(str(folder / "tokens.arrow")), chosen, DataCounts(**summary))


def _cache_key(config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> str:
    options = {
        "version": CACHE_VERSION,
        "content": source.content_hash(),
        "tokenizer": _tokenizer_hash(tokenizer),
        "fallback": FALLBACK_TEMPLATE,
        "limit": limit,
        **{
            name: getattr(config, name)
            for name in ("format", "columns", "sequence_length", "train_on_prompt", "on_bad_row")
        },
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tokenize_into(
    folder: Path,
    config: DataConfig,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    limit: int | None,
) -> None:
    """Tokenize ``source`` and put the result at ``folder``, whole or not at all."""
    reader = RowReader(config, source, key, limit)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="unfinished_", dir=folder.parent))
    except OSError as error:
        raise UserError(f"data.cache_dir={folder.parent}: can't be written ({error}), name another") from error
    try:
        _write_tokens(scratch / "tokens.arrow", reader, tokenizer)
        _refuse_unusable(reader.counts, source, config, key)
        chosen = reader.format.name if reader.format is not None else ""
        (scratch / "counts.json").write_text(json.dumps({"format": chosen, **dataclasses.asdict(reader.counts)}))
        try:
            scratch.rename(folder)
        except OSError:  # another machine on the same file system was faster
            if not (folder / "counts.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class RowReader:
    """Goes through a source's rows once, finds their format, and counts what becomes of them."""

    def __init__(self, config: DataConfig, source: Source, key: str, limit: int | None) -> None:
        self.config = config
        self.source = source
        self.key = key
        self.limit = limit
        self.format: RowFormat | None = None
        self.counts = DataCounts()

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
        """Yield every row that has a trained token, as tokens."""
        encoder: Encoder | None = None
        for index, row in enumerate(self.source.rows()):
            if index == self.limit:
                return
            if index and index % ROWS_A_REPORT == 0:
                logger.info("tokenized %d rows of %s", index, self.source.name)
            self.counts.read += 1
            if isinstance(row, BrokenRow):
                self._bad(row.place, row.reason)
                continue
            if encoder is None or self.format is None:
                self.format = choose_format(self.config.format, self.config.columns, row.values)
                if self.format.name != "text":
                    ensure_chat_template(tokenizer)
                encoder = Encoder(tokenizer, self.config.sequence_length, self.config.train_on_prompt)
            try:
                sample = self.format.to_sample(row.values)
                encoded = encoder.encode(sample)
            except BadRowError as error:
                self._bad(row.place, str(error))
                continue
            unread = self.format.unread(row.values)
            self.counts.unread_columns += sorted(unread.difference(self.counts.unread_columns))
            self.counts.not_rendered = encoder.left_out
            if self._count(sample, encoded):
                yield encoded

    def _count(self, sample: Sample, encoded: Encoded) -> bool:
        """Count a row, and return whether it is used."""
        counts = self.counts
        if not encoded.trained_tokens:
            within = f" within data.sequence_length={self.config.sequence_length}" if encoded.cut else ""
            counts.leave_out(f"without a trained token{within}")
            return False
        counts.used += 1
        counts.cut += encoded.cut
        counts.tokens += len(encoded.input_ids)
        counts.trained_tokens += encoded.trained_tokens
        if isinstance(sample, Conversation):
            counts.empty_answers += sum(
                message["role"] == "assistant" and index not in sample.untrained and _is_empty(message)
                for index, message in enumerate(sample.messages)
            )
        return True

    def _bad(self, place: str, reason: str) -> None:
        if self.config.on_bad_row == "error":
            raise UserError(
                f"{self.key}={self.source.name}: {place}: {reason}; mend the row, or set data.on_bad_row=skip"
            )
        kind = re.split(r", found | \(|; ", reason)[0]  # what follows is of this row alone
        self.counts.leave_out(f"bad: {kind}")
        if sum(count for why, count in self.counts.left_out.items() if why.startswith("bad: ")) <= BAD_ROWS_SHOWN:
            logger.warning("skipped %s: %s", place, reason)


def _is_empty(answer: Message) -> bool:
    """Whether an answer says nothing: no text, no call, no thought."""
    return not any(str(answer.get(key) or "").strip() for key in ANSWER_KEYS)


def _write_tokens(file: Path, reader: RowReader, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the rows that are used, as Arrow, a batch at a time."""
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens, "length": pa.int32()})
    batch: list[Encoded] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def flush() -> None:
            columns = [
                pa.array([row.input_ids for row in batch], tokens),
                pa.array([row.labels for row in batch], tokens),
                pa.array([len(row.input_ids) for row in batch], pa.int32()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            batch.clear()

        for encoded in reader.encoded(tokenizer):
            batch.append(encoded)
            if len(batch) == ROWS_A_BATCH:
                flush()
        if batch:
            flush()


def _refuse_unusable(counts: DataCounts, source: Source, config: DataConfig, key: str) -> None:
    if counts.used:
        return
    if not counts.read:
        raise UserError(f"{key}={source.name}: the data set is empty")
    bad = {reason: count for reason, count in counts.left_out.items() if not reason.startswith("without")}
    if bad and sum(bad.values()) == counts.read:
        raise UserError(f"{key}={source.name}: all {counts.read} rows are bad ({counts.describe()})")
    raise UserError(
        f"{key}={source.name}: none of {counts.read} rows keeps a trained token within "
        f"data.sequence_length={config.sequence_length} ({counts.describe()}); raise it, or look at the rows' answers"
    )
