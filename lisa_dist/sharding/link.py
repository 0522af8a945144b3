"""The way between host memory and the device: buffers, copies that run ahead, and slots that weights arrive in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lisa_dist.runtime import distributed
from lisa_dist.sharding.pinned import PinnedPool


class Slot:
    """A buffer on the device that holds one block's frozen weights at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None  # whose weights it holds, or will hold when the copy has arrived
        self.filled: Any = None  # events of the device
        self.free: Any = None


class Link:
    """Copies within the memory of one device, where a copy is there at once: a run on the CPU, and a plan.

    Attributes:
        copied_bytes: what was copied to the device since the start.
    """

    def __init__(self, host: str = "cpu") -> None:
        """Have host buffers on the device that ``host`` names: ``meta`` where nothing is allocated."""
        self.copied_bytes = 0
        self._host = host

    def host_buffer(self, size: int) -> Tensor:
        """Return ``size`` bytes of host memory, uninitialised."""
        return torch.empty(size, dtype=torch.uint8, device=self._host)

    def fetch(self, slot: Slot, host: Tensor) -> None:
        """Begin to copy a host buffer into a slot, once what computes with the slot has handed it back."""
        self.copied_bytes += host.nbytes
        self._copy(slot, host)

    def wait(self, slot: Slot) -> None:
        """Have what is computed from now on wait until the slot is filled. The host does not wait."""

    def hand_back(self, slot: Slot) -> None:
        """Say that whatever was to be computed with the slot has been asked for."""

    def send(self, state: Tensor, host: Tensor) -> Any:
        """Begin to copy a tensor of the device, once it is computed, to host memory of its shape and dtype.

        Returns:
            What :meth:`wait_sent` is to be given; until then the tensor must be kept, as it is.
        """
        host.copy_(state)

    def wait_sent(self, sent: Any) -> None:
        """Have what is computed from now on wait until a tensor has been copied to host memory."""

    def drain(self) -> None:
        """Wait until nothing is on its way, so that host buffers may be given up."""

    def _copy(self, slot: Slot, host: Tensor) -> None:
        slot.buffer[: host.numel()].copy_(host)


class CudaLink(Link):
    """Copies of pinned memory on a stream of their own, beside what the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.stream = torch.cuda.Stream(device)
        self.stream_to_host = torch.cuda.Stream(device)  # a link carries both directions at once
        self._pinned = PinnedPool()

    def host_buffer(self, size: int) -> Tensor:
        """Return ``size`` bytes of pinned host memory.

        Raises:
            UserError: the driver or the system refuses to pin as much.
        """
        return self._pinned.take(size)

    def wait(self, slot: Slot) -> None:
        """Have the stream that computes wait for the copy."""
        torch.cuda.current_stream().wait_event(slot.filled)

    def hand_back(self, slot: Slot) -> None:
        """Mark the place in the stream that computes at which the slot is free."""
        slot.free = torch.cuda.current_stream().record_event()

    def send(self, state: Tensor, host: Tensor) -> torch.cuda.Event:
        """Copy on a stream beside the one that brings weights; returns when it is done."""
        self.stream_to_host.wait_event(torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self.stream_to_host):
            host.copy_(state, non_blocking=True)
            return self.stream_to_host.record_event()

    def wait_sent(self, sent: torch.cuda.Event) -> None:
        """Have the stream that computes wait for the copy."""
        torch.cuda.current_stream().wait_event(sent)

    def drain(self) -> None:
        """Wait for the streams of copies."""
        self.stream.synchronize()
        self.stream_to_host.synchronize()

    def _copy(self, slot: Slot, host: Tensor) -> None:
        if slot.free is None:  # fresh memory, which may have served something that is still to be computed
            slot.free = torch.cuda.current_stream().record_event()
        self.stream.wait_event(slot.free)
        with torch.cuda.stream(self.stream):
            slot.buffer[: host.numel()].copy_(host, non_blocking=True)
            slot.filled = self.stream.record_event()


def link_to(device: torch.device) -> Link:
    """Return the link between host memory and ``device``."""
    if device.type == "cuda" and not distributed.is_simulated():
        return CudaLink(device)
    return Link("meta" if device.type == "meta" else "cpu")


class Slots:
    """A few slots and the list of visits to come, of which the next are always on their way.

    Attributes:
        misses: visits to blocks that were not on their way, and were fetched on demand.
    """

    def __init__(self, link: Link, count: int, size: int, device: torch.device, host: Callable[[int], Tensor]) -> None:
        """Have ``count`` slots of ``size`` bytes on ``device``, which are allocated at the first visit.

        Args:
            link: brings what they hold.
            count: of slots.
            size: of a slot.
            device: where they are.
            host: gives the host buffer of a block.
        """
        self.link, self.count, self.size, self.device, self.host = link, count, size, device, host
        self.slots: list[Slot] = []
        self.misses = 0
        self._visits: Sequence[int] = ()
        self._next = 0  # the place in ``_visits`` of the visit that is expected

    def expect(self, visits: Sequence[int]) -> None:
        """Give the visits to come, over and over, by their blocks."""
        self._visits, self._next = visits, 0

    def enter(self, block: int) -> Slot:
        """Return the slot that holds a block when what is computed from now on runs; send for those that come next.

        Between this and :meth:`leave` the slot is not touched.
        """
        if not self.slots:
            self.slots = [Slot(self.size, self.device) for _ in range(self.count)]
        order = [(self._next + offset) % len(self._visits) for offset in range(len(self._visits))]
        # A visit that is left out, as below a probe that ends early, is passed over.
        place = next((place for place in order if self._visits[place] == block), None)
        if place is not None:
            self._next = (place + 1) % len(self._visits)
        self.misses += all(slot.block != block for slot in self.slots)
        self._send_for([block])
        slot = next(slot for slot in self.slots if slot.block == block)
        self.link.wait(slot)
        return slot

    def leave(self, slot: Slot) -> None:
        """Hand a slot back, for the next block that is not there: while head and optimizer compute, all are filled."""
        self.link.hand_back(slot)
        self._send_for([])

    def _send_for(self, visited: list[int]) -> None:
        """Fetch what is ``visited`` now and comes next, as much as there are slots, where it is not there."""
        coming = itertools.chain(visited, self._visits[self._next :], self._visits[: self._next])
        wanted = list(dict.fromkeys(coming))[: len(self.slots)]
        for block in wanted:
            if all(slot.block != block for slot in self.slots):
                slot = next(slot for slot in self.slots if slot.block not in wanted)
                slot.block = block
                self.link.fetch(slot, self.host(block))

    def held_bytes(self) -> int:
        """Return the bytes that are there, or on their way, for the next visits."""
        return sum(self.host(slot.block).nbytes for slot in self.slots if slot.block is not None)

    def forget(self) -> None:
        """Hold nothing any more, since what lies in host memory changes."""
        self.link.drain()
        for slot in self.slots:
            slot.block = None
