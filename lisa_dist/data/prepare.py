"""From ``data.*`` to what a run trains and validates on (tokenize, hold out, pack), and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data.encode_rows import DataCounts
from lisa_dist.data.locate import has_subset, is_local, path_of
from lisa_dist.data.sequences import Sequences
from lisa_dist.data.sources import has_split
from lisa_dist.data.tokenized import TokenizedRows, tokenize
from lisa_dist.runtime.files import write_atomically

logger = logging.getLogger(__name__)

VALIDATION_KEY = 20  # of the generator that draws the rows held out; no key changes it, so that runs can be compared
ROWS_A_BATCH = 1000  # that are hashed at a time


@dataclass(frozen=True)
class PreparedData:
    """What a run trains on and validates on."""

    train: Sequences
    validation: Sequences | None
    format: str
    hash_file: Path  # where the hash of the rows trained on is kept, beside the tokens
    counts: DataCounts  # of data.path, the rows held out included
    validation_counts: DataCounts | None  # of a validation file or split; None where a fraction is held out


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, key: str = "data.path"
) -> PreparedData:
    """Tokenize the data, or find them in the cache. Collective: every rank.

    Args:
        config: what to read, and how.
        tokenizer: given the fallback chat template where it has none and the format needs one.
        seed: ``train.seed``, which the packing follows.
        key: the configuration key that ``config.path`` came from, for messages.

    Raises:
        UserError: there are no data, or rows that can't be used and ``data.on_bad_row=error``.
    """
    source = path_of(config, key)
    train = tokenize(config, source, config.split, tokenizer, key=key, subset=config.subset, limit=config.limit)
    held_out: TokenizedRows | None = None
    validation_rows: datasets.Dataset | None = None
    fraction = config.validation_fraction
    if fraction is not None:
        train_rows, validation_rows = hold_out(train.rows, fraction)
    else:
        train_rows = train.rows
        path = config.validation
        if path is None and config.split == "train" and has_split(source, "validation", config.subset):
            path = source
        if path is not None:
            subset = config.subset if path == source or has_subset(path, config.subset) else None
            split = validation_split(path, subset)
            held_out = tokenize(config, path, split, tokenizer, key="data.validation", subset=subset)
            validation_rows = held_out.rows
            if held_out.folder == train.folder:
                logger.warning(
                    "data.validation=%s: holds the very rows that are trained on, so none are held out", path
                )

    def sequences(rows: datasets.Dataset) -> Sequences:
        return Sequences.packed(rows, config.sequence_length, seed) if config.packing else Sequences(rows)

    return PreparedData(
        sequences(train_rows),
        None if validation_rows is None else sequences(validation_rows),
        train.format,
        train.folder / ("all.hash" if fraction is None else f"all_but_{fraction}.hash"),
        train.counts,
        None if held_out is None else held_out.counts,
    )


def validation_split(path: str, subset: str | None = None) -> str:
    """Return which split of ``path`` is validated on: validation, test, or, where it names none, all of it."""
    for split in ("validation", "test"):
        if has_split(path, split, subset):
            return split
    return "train" if is_local(path) else "validation"


def hold_out(rows: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split ``rows`` into training and validation rows; the same rows are held out whatever the seed of a run."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise UserError(f"data.validation={fraction}: of {len(rows)} rows none would be left to train on")
    order = np.random.default_rng(VALIDATION_KEY).permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def fingerprint(config: DataConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what two runs have in common that train on the same sequences, by part. The content counts, not the path.

    ``rows`` are those trained on, as tokens and labels in their order: what is held out, and what ``data.*`` makes of
    a row, shows there.
    """
    return {
        "rows": _kept_hash_of_rows(data),
        "tokenizer": hash_of_tokenizer(tokenizer),
        "template": None if data.format == "text" else _hash(tokenizer.chat_template),
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "date": data.counts.date or False,
        "group_by_length": config.group_by_length and not config.packing,
    }


def _kept_hash_of_rows(data: PreparedData) -> str:
    """Return the hash of the rows trained on, from the tokens' folder where an earlier start has left it."""
    try:
        return data.hash_file.read_text()
    except OSError:
        found = hash_of_rows(data.train.rows)
    with suppress(OSError):  # a cache that can be read only serves as well, the hash takes its time again
        write_atomically(data.hash_file, found)
    return found


def hash_of_rows(rows: datasets.Dataset) -> str:
    """Return a hash of the ``input_ids`` and ``labels`` of every row, in their order."""
    digest = hashlib.blake2b(digest_size=32)
    columns = rows.with_format("arrow", columns=["input_ids", "labels"])
    for start in range(0, len(rows), ROWS_A_BATCH):
        batch = columns[start : start + ROWS_A_BATCH]
        for name in ("input_ids", "labels"):
            lists = batch.column(name).combine_chunks()
            for part in (lists.value_lengths(), lists.flatten()):
                digest.update(np.ascontiguousarray(part.to_numpy(zero_copy_only=False), dtype=np.int32).tobytes())
    return digest.hexdigest()


def highest_token(rows: datasets.Dataset) -> int:
    """Return the highest number of a token in any row."""
    columns = rows.with_format("arrow", columns=["input_ids"])
    starts = range(0, len(rows), ROWS_A_BATCH)
    batches = (columns[start : start + ROWS_A_BATCH]["input_ids"].combine_chunks().flatten() for start in starts)
    return max((int(batch.to_numpy(zero_copy_only=False).max()) for batch in batches if len(batch)), default=0)


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and of the tokens around a text.

    What else a tokenizer does to a text shows in the rows; its file may change with the version of a library.
    """
    return _hash([sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id])


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=32).hexdigest()
