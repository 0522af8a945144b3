"""A link whose faults show on a CPU: it delivers late, and nothing can be read from a slot that was handed back.

Nor from host memory before it was waited for what is sent there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_dist.sharding.link import Link, Slot

POISON = 0xFF  # in every byte: not a number, in each floating-point type


class SimulatedLink(Link):
    """Fills a slot when somebody waits for it and not before, and spoils it as soon as it is handed back.

    Attributes:
        timeline: what the store asked for, in order: (``fetch``, ``use``, ``done`` or ``send``, block, bytes).
    """

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[tuple[str, int | None, int]] = []
        self._coming: dict[int, Tensor] = {}

    def _copy(self, slot: Slot, host: Tensor) -> None:
        self.timeline.append(("fetch", slot.block, host.nbytes))
        self._coming[id(slot)] = host
        slot.buffer.fill_(POISON)

    def wait(self, slot: Slot) -> None:
        host = self._coming[id(slot)]
        self.timeline.append(("use", slot.block, host.nbytes))
        slot.buffer[: host.numel()].copy_(host)

    def hand_back(self, slot: Slot) -> None:
        self.timeline.append(("done", slot.block, 0))
        slot.buffer.fill_(POISON)

    def send(self, state: Tensor, host: Tensor) -> tuple[Tensor, Tensor]:
        self.timeline.append(("send", None, host.nbytes))
        host.view(-1).view(torch.uint8).fill_(POISON)
        return state, host

    def wait_sent(self, sent: tuple[Tensor, Tensor]) -> None:
        state, host = sent
        host.copy_(state)
