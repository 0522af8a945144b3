"""Where inputs of blocks wait between the forward and the backward pass: on the device, or in host memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lisa_dist.sharding.link import Link, Slot

UNDER_WAY = 2  # states that are being copied to host memory at a time, and back from it

Place = tuple[int, int]  # a block and a micro-batch


@dataclass(frozen=True)
class HostStates:
    """How much host memory the inputs of blocks need."""

    each: int  # bytes of a full micro-batch's
    count: int  # blocks x micro-batches

    @property
    def total(self) -> int:
        """Bytes of all, where gradients reach every block."""
        return self.each * self.count


class WaitingStates(Protocol):
    """Takes the inputs of blocks upwards, and gives them back once each: downwards, of each block in the same order."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that are taken now."""
        ...

    def put(self, block: int, micro_batch: int, state: Tensor) -> None:
        """Take what enters a block, [sequences, tokens, width], which must stay as it is."""
        ...

    def take(self, block: int, micro_batch: int) -> Tensor:
        """Return it on the device, without a graph."""
        ...


class StatesOnDevice:
    """They stay where they are."""

    host_bytes = 0

    def __init__(self) -> None:
        self._states: dict[Place, Tensor] = {}

    def put(self, block: int, micro_batch: int, state: Tensor) -> None:
        """Keep it."""
        self._states[block, micro_batch] = state

    def take(self, block: int, micro_batch: int) -> Tensor:
        """Return it, and keep it no longer."""
        return self._states.pop((block, micro_batch))


class StatesOnHost:
    """They are copied to host memory behind the computation, and back ahead of it, a few at a time."""

    def __init__(self, link: Link, size: int) -> None:
        """Have them wait behind ``link``, in buffers of ``size`` bytes or of the state's, where that is larger.

        A link keeps its host buffers by size for the next step: so sizes must not follow those of micro-batches.
        """
        self.link, self.size = link, size
        self._device = torch.device("meta")  # that of what was put last
        self._waiting: dict[Place, Tensor] = {}  # in host memory
        self._leaving: deque[tuple[Tensor, Any]] = deque()  # a state on the device, and when it has been copied
        self._arriving: dict[Place, Slot] = {}
        self._coming: deque[Place] = deque()  # that are not on their way yet, in the order in which they are taken

    @property
    def host_bytes(self) -> int:
        """Bytes of the buffers of all that wait."""
        return sum(host.untyped_storage().nbytes() for host in self._waiting.values())

    def put(self, block: int, micro_batch: int, state: Tensor) -> None:
        """Begin to copy it; the memory of those before it is free by then, but for the last ones."""
        self._let_leave(UNDER_WAY - 1)
        self._device = state.device
        buffer = self.link.host_buffer(max(self.size, state.nbytes))
        host = buffer[: state.nbytes].view(state.dtype).view(state.shape)
        self._leaving.append((state, self.link.send(state, host)))
        self._waiting[block, micro_batch] = host

    def take(self, block: int, micro_batch: int) -> Tensor:
        """Return it when it has arrived, and have the next ones come."""
        if self._leaving:  # the first that is taken
            self._let_leave(0)
            self._coming.extend(sorted(self._waiting, key=lambda place: (-place[0], place[1])))
        while self._coming and len(self._arriving) <= UNDER_WAY:
            self._fetch(self._coming.popleft())
        slot, host = self._arriving.pop((block, micro_batch)), self._waiting.pop((block, micro_batch))
        self.link.wait(slot)
        return slot.buffer.view(host.dtype).view(host.shape)

    def _let_leave(self, staying: int) -> None:
        """Give up what has been copied, but for the last ones: before that nothing may be computed in its memory."""
        while len(self._leaving) > staying:
            _, sent = self._leaving.popleft()
            self.link.wait_sent(sent)

    def _fetch(self, place: Place) -> None:
        host = self._waiting[place]
        slot = self._arriving[place] = Slot(host.nbytes, self._device)
        slot.block = place[0]
        self.link.fetch(slot, host.view(-1).view(slot.buffer.dtype))
