"""One measured step: what a target does between two looks at the clock, and what it was given to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lisa_dist.commands.bench.stopwatch import Stopwatch
from lisa_dist.data.batches import GlobalBatches, MicroBatch, label_tokens
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now

HORIZON = 1 << 30  # the length of the schedule: the learning rate plays no part

PARTS = ("data", "forward", "backward", "optimizer", "other", "switch")


@dataclass
class Step:
    """One measured optimizer step: seconds by this rank's clock, the rest of all ranks."""

    seconds: float
    cpu_seconds: float  # that all threads of this rank spent on a processor: what other programs do, does not count
    parts: dict[str, float]
    tokens: int  # padding left out
    label_tokens: int
    flops: float


class StepClock:
    """Hands a target the micro-batches of one step after another, and measures its steps.

    A step is between :meth:`start` and :meth:`stop`, with one :meth:`next_batches` in it. The parts that a target times
    by ``stopwatch`` are noted; what is left is ``other``.
    """

    def __init__(self, batches: GlobalBatches) -> None:
        self.data = batches
        self.stopwatch = Stopwatch(distributed.device())
        self._batches = batches.iterate(0, HORIZON)
        self._seen = 0  # sequences
        self._steps: list[Step] = []

    def start(self) -> None:
        """Begin a step, once the GPU has done what came before."""
        self._started, self._cpu_started = now(), time.process_time()

    def next_batches(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the step."""
        with self.stopwatch("data"):
            self._micro_batches = next(self._batches)
        return self._micro_batches

    def stop(self, flops: Callable[[np.ndarray], float | None]) -> None:
        """End the step. Collective: every rank.

        Args:
            flops: the operations of all ranks in a step over samples of so many tokens; None: not counted.
        """
        seconds, cpu_seconds = now() - self._started, time.process_time() - self._cpu_started
        parts = {part: spent for part, spent in self.stopwatch.take().items() if part in PARTS}
        parts["other"] = seconds - sum(parts.values())
        lengths = self.data.lengths(self._seen)
        self._seen += self.data.global_batch_size
        (labels,) = distributed.all_reduce_sum([float(sum(map(label_tokens, self._micro_batches)))])
        self._steps.append(Step(seconds, cpu_seconds, parts, int(lengths.sum()), int(labels), flops(lengths) or 0.0))

    def take(self) -> list[Step]:
        """Return the steps since the last call."""
        taken, self._steps = self._steps, []
        return taken
