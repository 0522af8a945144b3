"""Random draws that leave no block out for long."""

from __future__ import annotations

import math
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sampling import CoverageSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_uniformly


class CoverageSampler(Sampler):
    """Draws uniformly, but any ``window`` periods in a row train every block at least once.

    LISA's independent draws can leave a block untrained for long: after p periods each is still untouched
    with probability (1 - active/n)^p. A sweep never does, but has no chance in it. This is between the two.
    Each block has a deadline, ``window`` periods after it last trained. A draw first takes from the blocks whose
    deadlines could no longer all be met otherwise, then freely from all others.
    """

    def __init__(self, config: CoverageSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        fewest = math.ceil(num_blocks / self.num_active)
        self.window = 2 * fewest if config.window is None else config.window
        if self.window < fewest and self.num_active <= num_blocks:
            raise UserError(
                f"sampler.window={self.window}: must be at least {fewest}, for {self.num_active} of {num_blocks} "
                "blocks train in a period"
            )
        self.periods_left = [self.window] * num_blocks  # of which one must train the block

    def _choose(self, period: int) -> list[int]:
        chosen: list[int] = []
        for deadline in range(1, self.window + 1):
            urgent = [block for block in range(self.num_blocks) if self.periods_left[block] <= deadline]
            # The periods after this one, up to the deadline, have room for so many of them:
            room = (deadline - 1) * self.num_active
            waiting = [block for block in urgent if block not in chosen]
            # More are urgent than may train where a resume has fewer active blocks, or a shorter window.
            needed = min(max(0, len(waiting) - room), self.num_active - len(chosen))
            chosen += draw_uniformly(self.generator, waiting, needed)
        others = [block for block in range(self.num_blocks) if block not in chosen]
        chosen += draw_uniformly(self.generator, others, self.num_active - len(chosen))
        self.periods_left = [self.window if b in chosen else left - 1 for b, left in enumerate(self.periods_left)]
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "periods_left": self.periods_left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.periods_left = [min(left, self.window) for left in state["periods_left"]]
