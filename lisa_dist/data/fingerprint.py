"""What the training data of a run are, so that a resume on other data is noticed. The content counts, not the path."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig
from lisa_dist.data.prepare import PreparedData
from lisa_dist.runtime.files import write_atomically

ROWS_A_BATCH = 1000

Fingerprint = dict[str, Any]  # by part: rows, tokenizer, template (hashes), sequence_length, packing


def fingerprint(config: DataConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """Return what two runs have in common that train on the same sequences.

    ``rows`` are those trained on, as tokens and labels in their order: what is held out, and what ``data.*`` makes of
    a row, shows there.
    """
    return {
        "rows": _kept_hash_of_rows(data),
        "tokenizer": hash_of_tokenizer(tokenizer),
        "template": None if data.format == "text" else _hash(tokenizer.chat_template),
        "sequence_length": config.sequence_length,
        "packing": config.packing,
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


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary and of the tokens around a text.

    What else a tokenizer does to a text shows in the rows; its file may change with the version of a library.
    """
    return _hash([sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id])


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=32).hexdigest()
