"""Where it matters which blocks are drawn: with frozen embeddings a backward pass ends at the lowest active block.

Then a step over low blocks takes longer than one over high blocks, and what is said of a method is a mean over draws.
"""

from __future__ import annotations

import statistics

from lisa_dist.config import Config
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.method.sampling import build_sampler

PERIODS = 600  # that are drawn to know the sampler's law; a sweep over any usual depth comes round several times


def coming_draws(config: Config, num_blocks: int) -> list[list[int]]:
    """Return the sets of blocks of many periods, ordered by their lowest block; empty where the draw doesn't matter.

    Those of a sampler that asks the model first, which can't be known before, are taken to be uniform. Where embeddings
    and head are drawn too, the draw that needs most stands for all.
    """
    if config.always_active.embeddings or config.sampler.draws_once or config.sampler.draws_non_block_modules:
        return []
    sampler = build_sampler(config.sampler, num_blocks, config.train.seed)
    if not 0 < sampler.num_active < num_blocks:
        return []
    if sampler.wants_probe(0):
        seed = config.train.seed if config.sampler.seed is None else config.sampler.seed
        sampler = build_sampler(UniformSamplerConfig(active_layers=sampler.num_active, seed=seed), num_blocks)
    return sorted((sampler.draw(period) for period in range(PERIODS)), key=min)


def typical_draws(config: Config, num_blocks: int) -> dict[str, list[int]]:
    """Return the ``low``, the ``middle`` and the ``high`` draw: the middle of each third; empty as above.

    The mean over these three is close to that over all draws, as the time depends on the lowest block linearly.
    """
    draws = coming_draws(config, num_blocks)
    if not draws:
        return {}
    return {name: sorted(draws[len(draws) * sixth // 6]) for name, sixth in (("low", 1), ("middle", 3), ("high", 5))}


def mean_lowest(draws: list[list[int]]) -> float:
    """Return the mean over the draws of their lowest block."""
    return statistics.mean(min(draw) for draw in draws)
