"""Every block, in every period."""

from __future__ import annotations

from lisa_dist.config.sampling import AllSamplerConfig
from lisa_dist.method.sampling.base import Sampler


class AllSampler(Sampler):
    """Returns every block: plain full-parameter training, or adapters in every block."""

    def __init__(self, config: AllSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks, num_active=num_blocks)

    def _choose(self, period: int) -> list[int]:
        return list(range(self.num_blocks))
