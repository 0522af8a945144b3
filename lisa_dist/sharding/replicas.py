"""Gradients summed over the replicas of a model, while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 4 * 2**20  # gradients smaller than this are sent together: a sum by itself costs more than their copies


@dataclass
class GradientSums:
    """Sums over the ranks of a process group, which go on beside what is computed."""

    group: dist.ProcessGroup
    dtype: torch.dtype  # in which they are sent and summed
    _bucket: list[Tensor] = field(default_factory=list)  # small gradients, until there are enough to be sent
    _under_way: list[Callable[[], None]] = field(default_factory=list)  # each waits for a sum and puts it in its place

    def begin(self, gradient: Tensor, then: Callable[[], None] | None = None) -> None:
        """Begin to sum a gradient in place. Collective: every rank of the group, with the same ones in the same order.

        Args:
            gradient: changed once the sum is there.
            then: called as soon as it is, which is waited for when the next one is begun.
        """
        if then is not None or gradient.nbytes >= BUCKET_BYTES:
            self._send([gradient], then)
            return
        self._bucket.append(gradient)
        if sum(small.nbytes for small in self._bucket) >= BUCKET_BYTES:
            self._send_bucket()

    def end(self) -> None:
        """Wait for all that was begun. Collective: every rank of the group."""
        self._send_bucket()
        self._wait()

    def _send_bucket(self) -> None:
        gradients, self._bucket = self._bucket, []
        if gradients:
            self._send(gradients)

    def _send(self, gradients: list[Tensor], then: Callable[[], None] | None = None) -> None:
        bucket = gradients[0]
        if len(gradients) > 1:
            bucket = torch.cat([gradient.flatten() for gradient in gradients])
            for gradient, part in zip(gradients, bucket.split([gradient.numel() for gradient in gradients])):
                gradient.set_(part.view_as(gradient))  # where it is summed, so that nothing is copied back
        sent = bucket.to(self.dtype)
        work = dist.all_reduce(sent, group=self.group, async_op=True)

        def end() -> None:
            work.wait()
            if sent is not bucket:
                bucket.copy_(sent)
            if then is not None:
                then()

        if sent is not bucket or then is not None:  # memory until the sum is there: no more than two at a time
            self._wait()
        self._under_way.append(end)

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.pop(0)()
