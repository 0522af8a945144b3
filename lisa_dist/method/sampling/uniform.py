"""LISA's sampler."""

from __future__ import annotations

from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_uniformly


class UniformSampler(Sampler):
    """Draws blocks uniformly, without replacement inside a draw and independently from period to period.

    LISA (arXiv 2403.17919), Algorithm 1: its equation p = w~ / w for the chance of each layer is reduced there
    to a constant for the blocks and 1 for embeddings and head; exactly gamma blocks are drawn to bound memory.
    """

    def _choose(self, period: int) -> list[int]:
        return draw_uniformly(self.generator, range(self.num_blocks), self.num_active)
