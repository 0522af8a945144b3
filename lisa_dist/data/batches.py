"""Global batches: which sequences make up an optimizer step, and this rank's part of them.

Nothing here has state. Epoch e is a permutation drawn from (seed, e), the epochs follow one another in one
stream, and the global batch after n sequences is ``stream[n : n + G]``, split into micro-batches in one way at any
number of ranks. So the place in the data is the number of sequences seen, and a run goes on exactly on any number of
ranks, and at the next sequence with any G.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from lisa_dist.data.encode import UNTRAINED
from lisa_dist.data.sequences import Sequences, TokenSequence
from lisa_dist.runtime import distributed

# input_ids, labels, position_ids: int64, [sequences, tokens]. Where sequences are packed also cu_seqlens: int32,
# [samples + 1], the borders of the samples in all sequences behind one another.
MicroBatch = dict[str, torch.Tensor]
PlaceOf = Callable[[int], int]  # number of a sequence, as the run sees them -> its place in the stream

# Lengths are rounded up to a multiple of this: matrix units are full, and there are few distinct shapes, for each of
# which kernels (on CPUs) and allocators (on GPUs) keep memory of their own.
LENGTH_MULTIPLE = 8
GROUP = 64  # sequences of like length that follow one another where they are grouped by length
GROUPS_SORTED = 50  # groups that are made of as many random sequences: more would be more alike, and less random
STEPS_AHEAD = 2  # global batches that are made ready in the background


def label_tokens(micro_batch: MicroBatch) -> int:
    """Number of tokens that are predicted with a loss; the label at position 0 is nobody's prediction."""
    return int((micro_batch["labels"][:, 1:] != UNTRAINED).sum())


def up_to_last_label(labels: torch.Tensor) -> torch.Tensor:
    """Return 1 for each position up to its row's last label and 0 after it, [rows, tokens]: leaves padding out."""
    return (labels != UNTRAINED).long().flip(1).cummax(1).values.flip(1)


def on_device(micro_batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch on this rank's device; the host does not wait for the copy."""
    return {key: tensor.to(distributed.device(), non_blocking=True) for key, tensor in micro_batch.items()}


@dataclass(kw_only=True)
class GlobalBatches:
    """The global batches of a run, by the sequences seen before them, and one rank's micro-batches of each.

    Where a method takes ``seen``, that is the number of sequences that the run has seen before the global batch; with
    ``place_of`` some of the stream are left out.
    """

    sequences: Sequences
    global_batch_size: int  # sequences of an optimizer step, over all ranks
    micro_batch_size: int  # sequences of one forward pass of one rank
    sequence_length: int  # the longest a sequence may be
    seed: int  # of the order
    rank: int  # whose part
    num_ranks: int  # that take different micro-batches
    pad_token_id: int  # any token id; padding has no label
    fixed_length: bool = False  # pad to sequence_length, not to a little above the micro-batch's longest sequence
    group_by_length: bool = False  # let sequences of like length follow one another

    def __post_init__(self) -> None:
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)  # a batch may span two epochs

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return len(self.sequences)

    def steps(self, epochs: float, seen: int = 0) -> int:
        """Steps that ``epochs`` passes over the data still take when ``seen`` sequences of them were seen."""
        left = math.ceil(epochs * self.num_sequences - 1e-9) - seen
        return max(0, math.ceil(left / self.global_batch_size))

    def epoch(self, seen: int) -> float:
        """Passes over the data that ``seen`` sequences are."""
        return seen / self.num_sequences

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        generator = self._generator(epoch)
        order = generator.permutation(self.num_sequences)
        return self._grouped(order, generator) if self.group_by_length else order

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return an epoch's ``order`` in groups of like length, the groups in random order.

        It depends on nothing that a resume may change: neither the sizes of batches nor the ranks.
        """
        groups: list[np.ndarray] = []
        for start in range(0, len(order), GROUP * GROUPS_SORTED):
            some = order[start : start + GROUP * GROUPS_SORTED]
            by_length = some[np.argsort(self.sequences.lengths[some], kind="stable")]
            groups += np.split(by_length, range(GROUP, len(by_length), GROUP))
        return np.concatenate([groups[index] for index in generator.permutation(len(groups))])

    def padding_of_epoch(self, epoch: int, *, grouped: bool = True) -> int:
        """Return the padding tokens of an epoch's micro-batches; not ``grouped``: had it not been grouped by length."""
        order = self._permutation(epoch)
        if not grouped:
            order = self._generator(epoch).permutation(self.num_sequences)
        steps, size = math.ceil(len(order) / self.global_batch_size), self.micro_batch_size
        parts = math.ceil(self.global_batch_size / size)
        lengths = np.zeros((steps, parts * size), dtype=np.int64)  # 0: no sequence
        places = np.arange(len(order))
        lengths[places // self.global_batch_size, places % self.global_batch_size] = self.sequences.lengths[order]
        by_part = -np.sort(-lengths, axis=1).reshape(-1, size)  # longest first, as micro_batch_indices cuts them
        longest = np.asarray([self._padded_length(int(length)) for length in by_part[:, 0]])
        return int((longest * (by_part > 0).sum(1)).sum() - by_part.sum())

    def global_batch(self, seen: int, place_of: PlaceOf = int) -> list[int]:
        """Return the sequences, by index, of the next optimizer step: the same on every rank."""
        places = [place_of(number) for number in range(seen, seen + self.global_batch_size)]
        return [int(self._permutation(place // self.num_sequences)[place % self.num_sequences]) for place in places]

    def lengths(self, seen: int, place_of: PlaceOf = int) -> np.ndarray:
        """Return the tokens of every sample of a global batch, padding left out: what attends to each other."""
        return self.sequences.sample_lengths(self.global_batch(seen, place_of))

    def micro_batch_indices(self, seen: int, place_of: PlaceOf = int) -> list[list[int]]:
        """Return the sequences of every micro-batch of a global batch, longest first: the same at any number of ranks.

        Sequences of like length share a micro-batch, so that little is padded and ranks are busy equally long.
        """
        batch = self.global_batch(seen, place_of)
        by_length = sorted(batch, key=lambda index: -self.sequences.lengths[index])
        return _chunks(by_length, self.micro_batch_size)

    def micro_batches(self, seen: int, place_of: PlaceOf = int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a step: as many on every rank, those beyond the data without labels."""
        parts = self.micro_batch_indices(seen, place_of)
        rounds = math.ceil(len(parts) / self.num_ranks)
        return [self._own_part(parts, turn) for turn in range(rounds)]

    def iterate(self, seen: int, steps: int, place_of: PlaceOf = int) -> Generator[list[MicroBatch]]:
        """Yield :meth:`micro_batches` of the next ``steps`` steps, made in the background."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            ahead: deque[Future[list[MicroBatch]]] = deque()
            for step in range(steps):
                ahead.append(pool.submit(self.micro_batches, seen + step * self.global_batch_size, place_of))
                if len(ahead) > STEPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def coming_micro_batches(self, seen: int, count: int, place_of: PlaceOf = int) -> list[MicroBatch]:
        """Return this rank's next ``count`` micro-batches, not yet trained on."""
        found: list[MicroBatch] = []
        while len(found) < count:
            found += self.micro_batches(seen, place_of)
            seen += self.global_batch_size
        return found[:count]

    def longest_micro_batch(self) -> MicroBatch:
        """Return the micro-batch of the longest sequences: what fits with it fits with any."""
        longest = np.argsort(-self.sequences.lengths, kind="stable")[: self.micro_batch_size]
        return self.collate(longest.tolist())

    def validation_batches(self, limit: int | None = None) -> Iterator[MicroBatch]:
        """Yield this rank's part of one pass over all sequences in their order: as many, at most ``limit``, on each."""
        parts = _chunks(list(range(self.num_sequences)), self.micro_batch_size)
        rounds = math.ceil(len(parts) / self.num_ranks)
        for turn in range(rounds if limit is None else min(rounds, limit)):
            yield self._own_part(parts, turn)

    def num_validated(self, limit: int | None = None) -> int:
        """Return how many sequences, the first ones, :meth:`validation_batches` yields on all ranks together."""
        if limit is None:
            return self.num_sequences
        return min(self.num_sequences, limit * self.num_ranks * self.micro_batch_size)

    def _own_part(self, parts: list[list[int]], turn: int) -> MicroBatch:
        place = turn * self.num_ranks + self.rank
        return self.collate(parts[place]) if place < len(parts) else self.empty_micro_batch()

    def _padded_length(self, longest: int) -> int:
        if self.fixed_length:
            return self.sequence_length
        return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max(longest, self.sequence_length))

    def empty_micro_batch(self) -> MicroBatch:
        """Return a micro-batch without labels, for a rank that has none while others do."""
        tokens = self._padded_length(1)
        shape = (self.micro_batch_size, tokens)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.int64),
            "labels": torch.full(shape, UNTRAINED, dtype=torch.int64),
            "position_ids": torch.arange(tokens).expand(shape).contiguous(),
        }
        return _ready(batch | self._borders(batch["position_ids"]))

    def collate(self, indices: list[int]) -> MicroBatch:
        """Put sequences into tensors, padded at the right.

        There is no attention mask: causal attention never looks at padding from before it, and transformers
        keeps packed samples apart by their position ids only where no mask is given and nothing is cached, so the
        model must be called with ``use_cache=False`` (https://github.com/huggingface/transformers/pull/39194).
        """
        chosen: list[TokenSequence] = [self.sequences[index] for index in indices]
        tokens = self._padded_length(max(len(one.input_ids) for one in chosen))
        batch = {
            "input_ids": np.full((len(chosen), tokens), self.pad_token_id, dtype=np.int64),
            "labels": np.full((len(chosen), tokens), UNTRAINED, dtype=np.int64),
            "position_ids": np.zeros((len(chosen), tokens), dtype=np.int64),
        }
        for row, one in enumerate(chosen):
            length = len(one.input_ids)
            batch["input_ids"][row, :length] = one.input_ids
            batch["labels"][row, :length] = one.labels
            batch["position_ids"][row, :length] = one.position_ids
            # Padding counts on from the last token, so that it looks like no further packed sample.
            batch["position_ids"][row, length:] = one.position_ids[-1] + 1 + np.arange(tokens - length)
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return _ready(tensors | self._borders(tensors["position_ids"]))

    def _borders(self, position_ids: torch.Tensor) -> MicroBatch:
        """Return ``cu_seqlens`` of packed sequences, found here so that no GPU is waited for; else nothing.

        As long for every micro-batch, its last border repeated: graphs of torch.compile depend on shapes.
        """
        if self.sequences.packing is None:
            return {}
        borders = torch.nonzero(position_ids.flatten() == 0).flatten()
        found = torch.full((self.micro_batch_size * self.sequences.most_samples + 1,), position_ids.numel())
        found[: len(borders)] = borders
        return {"cu_seqlens": found.int()}


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _ready(micro_batch: MicroBatch) -> MicroBatch:
    """Pin the memory where there is a GPU, so that the copy to it can overlap with computation."""
    if not torch.cuda.is_available():
        return micro_batch
    return {name: tensor.pin_memory() for name, tensor in micro_batch.items()}
