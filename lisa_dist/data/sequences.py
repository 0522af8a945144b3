"""The sequences that are trained on: token rows from disk, one a sequence or several packed into one."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass

import datasets
import numpy as np

from lisa_dist.data.encode import UNTRAINED


@dataclass(frozen=True)
class TokenSequence:
    """One sequence, int64 arrays of shape [tokens]; ``position_ids`` restart where a sample begins."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Sequences:
    """Token rows by sequence. The rows stay memory-mapped; only lengths and the packing plan are held."""

    def __init__(self, rows: datasets.Dataset, packing: list[list[int]] | None = None) -> None:
        """Make sequences of ``rows`` as they are tokenized: each one, or those that ``packing`` lists for each."""
        self.rows = rows.with_format("numpy", columns=["input_ids", "labels"])
        self.packing = packing
        self.row_lengths = np.asarray(rows.with_format("numpy", columns=["length"])["length"][:], dtype=np.int64)
        if packing is None:
            self.lengths = self.row_lengths
        else:
            self.lengths = np.asarray([self.row_lengths[members].sum() for members in packing], dtype=np.int64)

    @classmethod
    def packed(cls, rows: datasets.Dataset, sequence_length: int, seed: int) -> Sequences:
        """Pack ``rows`` into sequences of at most ``sequence_length`` tokens."""
        lengths = np.asarray(rows.with_format("numpy", columns=["length"])["length"][:])
        return cls(rows, pack(lengths, sequence_length, seed))

    @functools.cached_property
    def most_samples(self) -> int:
        """The most samples that lie in one sequence."""
        return 1 if self.packing is None else max((len(members) for members in self.packing), default=1)

    def sample_lengths(self, indices: list[int]) -> np.ndarray:
        """Return the tokens of every sample in these sequences."""
        packing = self.packing
        members = indices if packing is None else [member for index in indices for member in packing[index]]
        return self.row_lengths[members]

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


def pack(lengths: list[int] | np.ndarray, capacity: int, seed: int) -> list[list[int]]:
    """Put samples into as few sequences as best fit decreasing finds.

    Args:
        lengths: tokens of each sample, none above ``capacity``.
        capacity: tokens of a sequence.
        seed: decides which of equally long samples meet.

    Returns:
        For each sequence the samples in it, by index.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    sequences: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> sequences with that much room
    rooms: list[int] = []  # the keys of by_room, ascending
    for sample in order.tolist():
        size = int(sizes[sample])
        if size > capacity:
            raise ValueError(f"sample {sample} has {size} tokens, a sequence holds {capacity}")
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            room, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            room = rooms[at]
            sequence = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        sequences[sequence].append(sample)
        left = room - size
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(sequence)
    return sequences
