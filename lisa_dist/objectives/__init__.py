"""What a model is trained for: a micro-batch -> the sum of its losses, and the count that this sum is divided by.

An objective knows the model and the batch, and not what of the model trains or on how many ranks: both numbers are
added up over the micro-batches and ranks of a step, and divided once, by those who call it.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from lisa_dist.data.batches import MicroBatch


class Objective(Protocol):
    """Training, validation, probes and bench ask this alone for a loss."""

    def __call__(self, model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, int]:
        """Run the model forward. Collective where it is sharded: every rank.

        Args:
            model: as the objective's own preparation left it.
            micro_batch: of this rank, in host memory.

        Returns:
            The sum of the losses, a float32 scalar on the model's device; and what it is to be divided by, once those
            of all micro-batches and ranks are added, counted on the host.
        """
