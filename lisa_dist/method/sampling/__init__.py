"""Which blocks train in a period: pure state machines, lists in, indices out; one file a sampler.

No torch, no collectives, no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lisa_dist.config import SamplerConfig, UserError
from lisa_dist.method.sampling.all import AllSampler
from lisa_dist.method.sampling.bandit import BanditSampler
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.coverage import CoverageSampler
from lisa_dist.method.sampling.fixed import FixedSampler
from lisa_dist.method.sampling.gradient import GradientSampler
from lisa_dist.method.sampling.importance import ImportanceSampler
from lisa_dist.method.sampling.outlier import OutlierSampler
from lisa_dist.method.sampling.sweep import SweepSampler
from lisa_dist.method.sampling.uniform import UniformSampler
from lisa_dist.method.sampling.weighted import WeightedSampler

__all__ = ["Sampler", "build_sampler"]

SAMPLERS: dict[str, Callable[[Any, int], Sampler]] = {
    "all": AllSampler,
    "bandit": BanditSampler,
    "coverage": CoverageSampler,
    "fixed": FixedSampler,
    "gradient": GradientSampler,
    "importance": ImportanceSampler,
    "outlier": OutlierSampler,
    "sweep": SweepSampler,
    "uniform": UniformSampler,
    "weighted": WeightedSampler,
}


def build_sampler(config: SamplerConfig, num_blocks: int, seed: int = 0) -> Sampler:
    """Return the sampler of ``config`` for a model of ``num_blocks`` blocks.

    Args:
        config: which sampler, and its settings.
        num_blocks: blocks of the model, and what is drawn beside them.
        seed: the run's (``train.seed``), of the draws too where ``sampler.seed`` is null.

    Raises:
        UserError: the model has too few blocks for what is asked, or a listed block does not exist.
    """
    seeded = config if config.seed is not None else replace(config, seed=seed)
    sampler = SAMPLERS[config.name](seeded, num_blocks)
    if sampler.num_active > num_blocks:
        others = ", with embeddings and head" if config.draws_non_block_modules else ""
        raise UserError(
            f"sampler.active_layers={sampler.num_active}: must be at most {num_blocks}, "
            f"the number of blocks of this model{others}"
        )
    return sampler
