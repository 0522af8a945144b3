"""Gradients summed over the replicas of a model, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class GradientSums:
    """Sums over the ranks of a process group; those that were begun are ended when the backward pass is."""

    group: dist.ProcessGroup
    dtype: torch.dtype  # in which they are sent and summed
    _under_way: list[Callable[[], None]] = field(default_factory=list)  # each waits for a sum and puts it in its place

    def begin(self, gradient: Tensor, then: Callable[[], None] | None = None) -> None:
        """Begin to sum a gradient in place; to be called in a backward pass, which waits for the sum when it ends.

        Collective: every rank of the group, with the same gradients in the same order.

        Args:
            gradient: changed once the sum is there.
            then: called as soon as it is, which is waited for when the next one is begun.
        """
        if not self._under_way:
            # As FSDP2 and DDP have something done at the end of a backward pass; it has no public name.
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self._end)
        sent = gradient.to(self.dtype)
        work = dist.all_reduce(sent, group=self.group, async_op=True)

        def end() -> None:
            work.wait()
            if sent is not gradient:
                gradient.copy_(sent)
            if then is not None:
                then()

        if then is not None:
            self._end()
        self._under_way.append(end)

    def add_up(self, gradient: Tensor) -> None:
        """Sum a gradient in place, and wait for it. Collective: every rank of the group."""
        sent = gradient.to(self.dtype)
        dist.all_reduce(sent, group=self.group)
        if sent is not gradient:
            gradient.copy_(sent)

    def _end(self) -> None:
        while self._under_way:
            self._under_way.pop(0)()
