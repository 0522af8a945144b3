"""The sequences that are trained on: token rows from disk, one a sequence or several packed into one."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np

from lisa_dist.data.encode import UNTRAINED
from lisa_dist.data.packing import pack


@dataclass(frozen=True)
class TokenSequence:
    """One sequence, int64 arrays of shape [tokens]; ``position_ids`` restart where a sample begins."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Sequences:
    """Token rows by sequence. The rows stay memory-mapped; only lengths and the packing plan are held."""

    def __init__(self, rows: datasets.Dataset, packing: list[list[int]] | None = None) -> None:
        """Lay rows out as sequences.

        Args:
            rows: with ``input_ids``, ``labels`` and ``length``.
            packing: for each sequence its rows; None: each row is a sequence.
        """
        self.rows = rows.with_format("numpy", columns=["input_ids", "labels"])
        self.packing = packing
        row_lengths = np.asarray(rows.with_format("numpy", columns=["length"])["length"][:], dtype=np.int64)
        if packing is None:
            self.lengths = row_lengths
        else:
            self.lengths = np.asarray([row_lengths[members].sum() for members in packing], dtype=np.int64)

    @classmethod
    def packed(cls, rows: datasets.Dataset, sequence_length: int, seed: int) -> Sequences:
        """Pack ``rows`` into sequences of at most ``sequence_length`` tokens."""
        lengths = np.asarray(rows.with_format("numpy", columns=["length"])["length"][:])
        return cls(rows, pack(lengths, sequence_length, seed))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenSequence:
        members = [index] if self.packing is None else self.packing[index]
        samples = [self.rows[member] for member in members]
        labels = [np.array(sample["labels"], dtype=np.int64) for sample in samples]
        for sample_labels in labels:
            sample_labels[:1] = UNTRAINED  # else the last token of the sample before would have to predict it
        return TokenSequence(
            np.concatenate([sample["input_ids"] for sample in samples]).astype(np.int64),
            np.concatenate(labels),
            np.concatenate([np.arange(len(sample_labels), dtype=np.int64) for sample_labels in labels]),
        )
