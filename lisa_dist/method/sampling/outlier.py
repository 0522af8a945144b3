"""OwLore's sampler: blocks with many outliers more often."""

from __future__ import annotations

import logging
from typing import Any

from lisa_dist.config.sampling import OutlierSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_without_replacement

logger = logging.getLogger(__name__)


class OutlierSampler(Sampler):
    """Draws blocks in proportion to their layerwise outlier distribution, measured once before the first draw.

    OwLore (arXiv 2405.18380, https://github.com/pixeli99/OwLore): with A_ij = ||X_j||_2 |W_ij| for the inputs X
    of each linear layer, D_l is the share of entries of block l above M times their mean, and p_l = D_l / sum D.
    ``reverse`` is its control experiment: p_l proportional to max(D) - D_l, so that the block with the most
    outliers is never drawn as long as another is left.

    What differs: the public code reads a table computed beforehand for one model; here the probe measures
    calibration batches of the run's own data. A model without outliers (all D zero) is drawn from uniformly.
    """

    def __init__(self, config: OutlierSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.reverse = config.reverse
        self.threshold = config.threshold
        self.shares: list[float] | None = None

    def wants_probe(self, period: int) -> bool:
        return period == 0

    def observe(self, scores: list[float]) -> None:
        self._check_scores(scores, self.num_blocks)
        self.shares = list(scores)
        if not any(scores):
            logger.warning(
                "sampler=outlier: nothing is above sampler.threshold=%g times the mean, so blocks are drawn uniformly; "
                "a lower one tells them apart",
                self.threshold,
            )

    def weights(self) -> list[float]:
        """Return the weight of each block in a draw."""
        if self.shares is None:
            raise ValueError("the first draw by outliers needs a probe before it")
        if self.reverse:
            top = max(self.shares)
            return [top - share for share in self.shares]
        return self.shares

    def _choose(self, period: int) -> list[int]:
        return draw_without_replacement(self.generator, self.weights(), self.num_active)

    def scores(self) -> list[float] | None:
        """The share D_l of outliers in each block."""
        return None if self.shares is None else list(self.shares)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "shares": self.scores()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shares = None if state["shares"] is None else list(state["shares"])
