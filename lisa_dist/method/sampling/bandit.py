"""A bandit over blocks: learns from the training steps which blocks to draw more often."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lisa_dist.config.sampling import BanditSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_uniformly, draw_without_replacement

LARGEST_EXPONENT = 5.0  # no block is more than e^5 = 148 times as likely as another


class BanditSampler(Sampler):
    """Draws by exponential weights over squared gradient norms, which every training step of a block shows.

    After MISA (arXiv 2511.00056, and its authors' code). At first every block trains once, in random order. From then
    on a draw holds the blocks that have waited longest (``forced``), and others in proportion to

        exp(min(5, eta * G_i / mean of G)),

    where G_i is the moving average, with its bias corrected, of the mean square of the block's gradient: the squared
    norm divided by the number of entries. There is no probe; an estimate moves only while its block trains.

    The two longest waiting are always in a draw, as there, but they are never more than half of it, so that what was
    learnt counts: one of 2 or 3 blocks, and where a single block trains, that of every second period. So each block
    trains at least once in n periods (2 n where a single one trains) after the first round.

    What differs: MISA samples modules, the linear layers inside a block, up to a share of trainable parameters.
    Here the unit is the block, because a block is one FSDP2 group with one storage dtype, and a group that is
    half frozen would keep all of itself in fp32. The division by the mean makes eta a number without units.
    """

    def __init__(self, config: BanditSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.eta = config.eta
        self.smoothing = config.smoothing
        self.averages = [0.0] * num_blocks  # of the squares, from 0
        self.steps = [0] * num_blocks  # that each average has seen
        self.last_trained = [-1] * num_blocks  # period, -1: never

    def observe_step(self, squares: Mapping[int, float]) -> None:
        for block, square in squares.items():
            self.averages[block] = self.smoothing * square + (1 - self.smoothing) * self.averages[block]
            self.steps[block] += 1

    def estimates(self) -> list[float]:
        """Return G, the averages with their bias towards 0 corrected; 0 for a block that never trained."""
        return [
            average / (1 - (1 - self.smoothing) ** steps) if steps and self.smoothing else 0.0
            for average, steps in zip(self.averages, self.steps)
        ]

    def weights(self) -> list[float]:
        """Return the weight of each block among those that are not forced."""
        estimates = self.estimates()
        mean = sum(estimates) / self.num_blocks
        if mean == 0:
            return [1.0] * self.num_blocks
        return [math.exp(min(LARGEST_EXPONENT, self.eta * estimate / mean)) for estimate in estimates]

    def forced(self, period: int) -> list[int]:
        """Return the blocks that the draw of ``period`` must hold, those that have waited longest."""
        count = period % 2 if self.num_active == 1 else min(2, self.num_active // 2)
        by_wait = sorted(range(self.num_blocks), key=lambda block: self.last_trained[block])
        return by_wait[:count]

    def _choose(self, period: int) -> list[int]:
        new = [block for block in range(self.num_blocks) if self.last_trained[block] < 0]
        chosen = draw_uniformly(self.generator, new, min(len(new), self.num_active)) if new else self.forced(period)
        others = [block for block in range(self.num_blocks) if block not in chosen]
        weights = self.weights()
        drawn = draw_without_replacement(
            self.generator, [weights[block] for block in others], self.num_active - len(chosen)
        )
        chosen += [others[index] for index in drawn]
        for block in chosen:
            self.last_trained[block] = period
        return chosen

    def scores(self) -> list[float] | None:
        """The estimates G."""
        return self.estimates()

    def state_dict(self) -> dict[str, Any]:
        learnt = {"averages": [*self.averages], "steps": [*self.steps], "last_trained": [*self.last_trained]}
        return super().state_dict() | learnt

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.averages, self.steps = list(state["averages"]), list(state["steps"])
        self.last_trained = list(state["last_trained"])
