"""Packing: several samples in one sequence, by best fit, from the lengths and the seed alone."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int) -> list[list[int]]:
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
