"""Token rows for tests."""

from __future__ import annotations

import datasets
import numpy as np


def make_rows(lengths: list[int], vocabulary: int = 1000) -> datasets.Dataset:
    """Rows of random tokens, every token labelled; token 1 of row i is i + 1, so that rows can be told apart."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, vocabulary, size=length).astype(np.int32) for length in lengths]
    for row, tokens in enumerate(ids):
        tokens[1] = row + 1
    labels = [tokens.copy() for tokens in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": np.asarray(lengths, np.int32)})
