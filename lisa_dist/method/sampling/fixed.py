"""The same blocks in every period."""

from __future__ import annotations

from lisa_dist.config import UserError
from lisa_dist.config.sampling import FixedSamplerConfig
from lisa_dist.method.sampling.base import Sampler


class FixedSampler(Sampler):
    """Returns the blocks listed in ``sampler.blocks``, in every period."""

    def __init__(self, config: FixedSamplerConfig, num_blocks: int) -> None:
        if not config.blocks:
            raise UserError("sampler.blocks=[]: must list at least one block, as in sampler.blocks=[0,5]")
        for block in config.blocks:
            if block >= num_blocks:
                raise UserError(
                    f"sampler.blocks={config.blocks}: {block} must be at most {num_blocks - 1}, "
                    f"the index of the last of the {num_blocks} blocks of this model"
                )
        self.blocks = sorted(config.blocks)
        super().__init__(config, num_blocks, num_active=len(self.blocks))

    def _choose(self, period: int) -> list[int]:
        return list(self.blocks)
