"""BAdam's orders: the blocks in turn."""

from __future__ import annotations

from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sampling import SweepSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_uniformly


class SweepSampler(Sampler):
    """Goes through the blocks, ``active_layers`` at a time, so that each trains once a sweep.

    BAdam (arXiv 2404.02827, https://github.com/Ledzy/BAdam): ascending, descending (its default), random
    without replacement, anew each sweep, or a given order. BAdam takes one block at a time. Here a period takes
    several; where their number does not divide the number of blocks, a period ends one sweep and begins the
    next, so that the memory stays the same: at no time has any block trained more than once more often than
    another. Unlike there, the place in the order is part of the state, so a resume is exact.
    """

    def __init__(self, config: SweepSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        if config.sequence and sorted(config.sequence) != list(range(num_blocks)):
            raise UserError(
                f"sampler.sequence={config.sequence}: must name each of the {num_blocks} blocks of this model "
                f"once, 0 to {num_blocks - 1}"
            )
        self.order = config.order
        self.sequence = list(config.sequence)
        self.remaining: list[int] = []  # of the current sweep, in their order

    def _choose(self, period: int) -> list[int]:
        chosen = self.remaining[: self.num_active]
        self.remaining = self.remaining[self.num_active :]
        missing = self.num_active - len(chosen)
        if missing:
            sweep = self._new_sweep()
            first = [block for block in sweep if block not in chosen][:missing]  # a new random order may repeat one
            self.remaining = [block for block in sweep if block not in first]
            chosen = chosen + first
        return chosen

    def _new_sweep(self) -> list[int]:
        match self.order:
            case "ascending":
                return list(range(self.num_blocks))
            case "descending":
                return list(reversed(range(self.num_blocks)))
            case "random":
                return draw_uniformly(self.generator, range(self.num_blocks), self.num_blocks)
        return list(self.sequence)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "remaining": self.remaining}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.remaining = list(state["remaining"])
