"""Rows to tokens, once a machine, kept on disk: every rank maps the same Arrow file into memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.config.paths import FULL, local_path
from lisa_dist.data.encode_rows import DataCounts, RowReader
from lisa_dist.data.first_row import no_rows
from lisa_dist.data.sources import Source, find_source
from lisa_dist.data.tokenizer import FALLBACK_TEMPLATE, ensure_chat_template
from lisa_dist.runtime.distributed import on_local_rank_zero

logger = logging.getLogger(__name__)

CACHE_VERSION = 11  # to be raised when the same rows give other tokens
TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema({"input_ids": TOKENS, "labels": TOKENS, "length": pa.int32()})


@dataclass(frozen=True)
class TokenizedRows:
    """The rows of one file or split as tokens, memory-mapped from the cache."""

    rows: datasets.Dataset  # input_ids, labels: lists of int32; length: int32
    format: str
    counts: DataCounts
    folder: Path  # of the cache, keyed by all that changes a token


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

    The others wait as long as it takes, and notice within ``parallel.timeout`` when that rank is lost.

    The cache is keyed by the content of the files, the tokenizer, and what of ``data.*`` changes the tokens.

    Raises:
        UserError: there are no rows, no rows with a trained token, or bad rows and ``data.on_bad_row=error``.
    """
    cache = local_path(config.cache_dir or "~/.cache/lisa_dist")

    def find_or_make() -> str:
        source = find_source(path, split, key, subset)
        for note in source.notes:
            logger.warning("%s=%s: %s", key, path, note)
        folder = cache / _cache_key(config, source, tokenizer, limit)
        if not (folder / "counts.json").is_file():
            _tokenize_into(folder, config, source, tokenizer, key, limit)
        return folder.name

    folders = set(on_local_rank_zero(find_or_make))
    if len(folders) != 1:
        raise UserError(f"{key}={path}: the files, or the tokenizer's, differ between the machines")
    tokenized = _load(cache / folders.pop(), tokenizer)
    for warning in tokenized.counts.warnings():
        logger.warning("%s=%s: %s", key, path, warning)
    if (date := tokenized.counts.date) is not None and config.date is None:
        told = "the chat template writes the day into rows: %s, when they were tokenized; data.date=%s settles it"
        logger.warning("%s=%s: " + told, key, path, date, date)
    return tokenized


def _load(folder: Path, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    summary = json.loads((folder / "counts.json").read_text())
    chosen = summary.pop("format")
    if chosen != "text":
        ensure_chat_template(tokenizer)
    rows = datasets.Dataset.from_file(str(folder / "tokens.arrow"))
    return TokenizedRows(rows, chosen, DataCounts(**summary), folder)


def _cache_key(config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> str:
    options = {
        "version": CACHE_VERSION,
        "content": source.content_hash(),
        "tokenizer": _tokenizer_hash(tokenizer),
        "fallback": FALLBACK_TEMPLATE,
        "limit": limit,
        **{
            name: getattr(config, name)
            for name in ("format", "columns", "sequence_length", "train_on_prompt", "on_bad_row", "date")
        },
    }
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tokenize_into(
    folder: Path, config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase, key: str, limit: int | None
) -> None:
    """Tokenize ``source`` and put the result at ``folder``, whole or not at all."""
    reader = RowReader(config, source, key, limit)
    try:
        scratch = folder.parent / f"unfinished_{uuid.uuid4().hex}"
        scratch.mkdir(parents=True)  # with the umask's mode, as what lies in it: a cache may be shared
    except OSError as error:
        raise UserError(f"data.cache_dir={folder.parent}: can't be written ({error}), name another") from error
    try:
        with pa.OSFile(str(scratch / "tokens.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for rows in reader.encoded(tokenizer):
                ids, labels = ([getattr(row, name) for row in rows] for name in ("input_ids", "labels"))
                columns = [pa.array(ids, TOKENS), pa.array(labels, TOKENS), pa.array(map(len, ids), pa.int32())]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        _refuse_unusable(reader.counts, source, config, key)
        chosen = reader.format.name if reader.format is not None else ""
        (scratch / "counts.json").write_text(json.dumps({"format": chosen, **dataclasses.asdict(reader.counts)}))
        try:
            scratch.rename(folder)
        except OSError:  # another machine on the same file system was faster
            if not (folder / "counts.json").is_file():
                raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        full = os.strerror(error.errno)
        raise UserError(f"data.cache_dir={folder.parent}: {full}; free space there, or name another") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse_unusable(counts: DataCounts, source: Source, config: DataConfig, key: str) -> None:
    if counts.used:
        return
    if not counts.read:
        raise no_rows(key, source.name)
    bad = {reason: count for reason, count in counts.left_out.items() if not reason.startswith("without")}
    if bad and sum(bad.values()) == counts.read:
        raise UserError(f"{key}={source.name}: all {counts.read} rows are bad ({counts.describe()})")
    raise UserError(
        f"{key}={source.name}: none of {counts.read} rows keeps a trained token within "
        f"data.sequence_length={config.sequence_length} ({counts.describe()}); raise it, or look at the rows' answers"
    )
