"""Rows to tokens, once a machine, kept on disk: every rank maps the same Arrow file into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data.encode import Encoded, Encoder
from lisa_dist.data.formats import BadRowError, Format, choose_format, to_sample
from lisa_dist.data.readers import BrokenRow
from lisa_dist.data.sources import Source, find_source
from lisa_dist.data.tokenizer import FALLBACK_TEMPLATE, ensure_chat_template
from lisa_dist.distributed import gather_objects, local_rank_zero_first

logger = logging.getLogger(__name__)

CACHE_VERSION = 2  # to be raised when the same rows give other tokens
ROWS_A_BATCH = 1000
BAD_ROWS_SHOWN = 3
ROWS_A_REPORT = 50_000


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows of one file or split."""

    rows: int  # rows with a trained token, those that are used
    bad_rows: int  # unreadable or not of the format, skipped by data.on_bad_row=skip
    dropped_rows: int  # without a trained token after the cut to data.sequence_length
    cut_rows: int  # cut at the right to data.sequence_length
    tokens: int
    trained_tokens: int

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0


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
    limit: int | None = None,
) -> TokenizedRows:
    """Tokenize one file or split on the first rank of each machine; every rank maps the result. Collective: every rank.

    The cache is keyed by the content of the files, the tokenizer, and what of ``data.*`` changes the tokens.

    Raises:
        UserError: there are no rows, no rows with a trained token, or bad rows and ``data.on_bad_row=error``.
    """
    cache = Path(config.cache_dir or "~/.cache/lisa_dist").expanduser()
    folder: Path | None = None
    with local_rank_zero_first() as first:
        if first:
            source = find_source(path, split, key)
            folder = cache / _cache_key(config, source, tokenizer, limit)
            if not (folder / "counts.json").is_file():
                _tokenize_into(folder, config, source, tokenizer, key, limit)
    folders = {found.name for found in gather_objects(folder) if found is not None}
    if len(folders) != 1:
        raise UserError(f"{key}={path}: the files, or the tokenizer's, differ between the machines")
    return _load(cache / folders.pop(), tokenizer)


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
        counts = _write_tokens(scratch / "tokens.arrow", reader, config, tokenizer)
        _refuse_unusable(counts, source, config, key)
        chosen = reader.format.name if reader.format is not None else ""
        (scratch / "counts.json").write_text(json.dumps({"format": chosen, **dataclasses.asdict(counts)}))
        try:
            scratch.rename(folder)
        except OSError:  # another machine on the same file system was faster
            if not (folder / "counts.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class RowReader:
    """Goes through a source's rows once, finds their format, and counts those that can't be used."""

    def __init__(self, config: DataConfig, source: Source, key: str, limit: int | None) -> None:
        self.config = config
        self.source = source
        self.key = key
        self.limit = limit
        self.format: Format | None = None
        self.bad_rows = 0

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
        """Yield every usable row as tokens."""
        encoder: Encoder | None = None
        for index, row in enumerate(self.source.rows()):
            if index == self.limit:
                return
            if index and index % ROWS_A_REPORT == 0:
                logger.info("tokenized %d rows of %s", index, self.source.name)
            if isinstance(row, BrokenRow):
                self._bad(row.place, row.reason)
                continue
            if encoder is None or self.format is None:
                self.format = choose_format(self.config.format, self.config.columns, row.values)
                if self.format.name != "text":
                    ensure_chat_template(tokenizer)
                encoder = Encoder(tokenizer, self.config.sequence_length, self.config.train_on_prompt)
            try:
                yield encoder.encode(to_sample(self.format, self.config.columns, row.values))
            except BadRowError as error:
                self._bad(row.place, str(error))

    def _bad(self, place: str, reason: str) -> None:
        if self.config.on_bad_row == "error":
            raise UserError(
                f"{self.key}={self.source.name}: {place}: {reason}; mend the row, or set data.on_bad_row=skip"
            )
        self.bad_rows += 1
        if self.bad_rows <= BAD_ROWS_SHOWN:
            logger.warning("skipped %s: %s", place, reason)


def _write_tokens(file: Path, reader: RowReader, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> DataCounts:
    """Write the rows that have a trained token, as Arrow, a batch at a time."""
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens, "length": pa.int32()})
    rows = dropped = cut = total = trained = 0
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
            cut += encoded.cut
            if not encoded.trained_tokens:
                dropped += 1
                continue
            rows += 1
            total += len(encoded.input_ids)
            trained += encoded.trained_tokens
            batch.append(encoded)
            if len(batch) == ROWS_A_BATCH:
                flush()
        if batch:
            flush()
    return DataCounts(rows, reader.bad_rows, dropped, cut, total, trained)


def _refuse_unusable(counts: DataCounts, source: Source, config: DataConfig, key: str) -> None:
    if counts.rows:
        return
    if counts.dropped_rows:
        raise UserError(
            f"{key}={source.name}: none of {counts.dropped_rows} rows keeps a trained token within "
            f"data.sequence_length={config.sequence_length}; raise it, or look at the rows' answers"
        )
    if counts.bad_rows:
        raise UserError(f"{key}={source.name}: all {counts.bad_rows} rows are bad")
    raise UserError(f"{key}={source.name}: the data set is empty")
