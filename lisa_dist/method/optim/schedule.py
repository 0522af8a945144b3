"""The learning rate: one schedule for the whole run, whichever blocks are active."""

from __future__ import annotations

import math

from lisa_dist.config import OptimizerConfig, SchedulerConfig
from lisa_dist.config.optimization import PARTS


def learning_rate(config: SchedulerConfig, base: float, step: int, max_steps: int) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        config: shape, warm-up and floor.
        base: the highest learning rate (``optimizer.lr``).
        step: counted from 0.
        max_steps: optimizer steps of the run; after the last one the rate would be ``min_lr_ratio`` x ``base``.
    """
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    if config.name == "constant":
        return base
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return base * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def learning_rates(config: SchedulerConfig, optimizer: OptimizerConfig, step: int, max_steps: int) -> dict[str, float]:
    """Return the learning rate of an optimizer step for each part of the model; arguments as in `learning_rate`."""
    return {part: learning_rate(config, optimizer.lr_of(part), step, max_steps) for part in PARTS}
