"""Gradients summed over the replicas of a model, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class GradientSums:
    """Sums over the ranks of a process group, which go on beside what is computed."""

    group: dist.ProcessGroup
    dtype: torch.dtype  # in which they are sent and summed
    _under_way: list[Callable[[], None]] = field(default_factory=list)  # each waits for a sum and puts it in its place

    def begin(self, gradient: Tensor, then: Callable[[], None] | None = None) -> None:
        """Begin to sum a gradient in place. Collective: every rank of the group, with the same ones in the same order.

        Args:
            gradient: changed once the sum is there.
            then: called as soon as it is, which is waited for when the next one is begun.
        """
        sent = gradient.to(self.dtype)
        work = dist.all_reduce(sent, group=self.group, async_op=True)

        def end() -> None:
            work.wait()
            if sent is not gradient:
                gradient.copy_(sent)
            if then is not None:
                then()

        if then is not None:
            self.end()
        self._under_way.append(end)

    def add_up(self, gradient: Tensor) -> None:
        """Sum a gradient in place, and wait for it. Collective: every rank of the group."""
        self.begin(gradient)
        self.end()

    def end(self) -> None:
        """Wait for all that was begun."""
        while self._under_way:
            self._under_way.pop(0)()
