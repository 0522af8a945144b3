"""What every sampler is: a state machine that is asked once a period which blocks train in it.

A sampler sees no tensor, no model and no process group. What it wants to know of the model it asks by a
``ProbeRequest``; whoever runs the model measures it, reduced over ranks, and hands the numbers to ``observe`` before
the draw. One that learns from the training itself says so in its configuration (``observes_steps``).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sampling import ProbeRequest, SamplerConfig


class Sampler(ABC):
    """Decides which blocks train in a period.

    A period goes: ``observe`` if ``wants_probe``, then ``draw``. Runs with equal state and equal scores draw
    equal blocks.

    Args:
        num_blocks: number of blocks of the model.
        num_active: how many each draw returns, where ``sampler.active_layers`` does not say it.

    Attributes:
        probe: what it asks of the model when it asks, or None.
        observes_steps: whether ``observe_step`` is to be called after every optimizer step.
        num_blocks: number of blocks of the model, indexed from 0.
        num_active: number of blocks that each draw returns.
        active: the last draw.
        last_period: the period it was for, -1 before the first.
    """

    def __init__(self, config: SamplerConfig, num_blocks: int, num_active: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.probe = config.probe
        self.observes_steps = config.observes_steps
        count = config.active_layers if num_active is None else num_active
        if count is None:
            raise UserError(f"sampler.active_layers=null: must be a number for sampler={config.name}")
        self.num_active = count
        assert config.seed is not None, "build_sampler settles the seed"
        self.generator = random.Random(config.seed)
        self.last_period = -1
        self.active: list[int] = []

    def draw(self, period: int) -> list[int]:
        """Return the blocks that train in ``period``, as sorted indices.

        Raises:
            ValueError: ``period`` does not come after the last one drawn.
        """
        if period <= self.last_period:
            raise ValueError(f"period {period} was drawn already; the last one was {self.last_period}")
        self.active = sorted(self._choose(period))
        self.last_period = period
        return list(self.active)

    @abstractmethod
    def _choose(self, period: int) -> list[int]:
        """Return the blocks of ``period`` in any order."""

    def wants_probe(self, period: int) -> bool:
        """Whether ``observe`` must be called before the draw of ``period``.

        Depends on the period and the configuration alone, so that every rank answers alike.
        """
        return False

    def request(self) -> ProbeRequest:
        """Return what ``observe`` expects next, where ``wants_probe``.

        It may be random: to be asked on the rank that draws, and the same until ``observe``.
        """
        assert self.probe is not None, f"{type(self).__name__} needs no probe"
        return self.probe

    def observe(self, scores: list[float]) -> None:
        """Take the result of the probe: a list as its kind gives it."""
        raise TypeError(f"{type(self).__name__} needs no probe")

    def observe_step(self, squares: Mapping[int, float]) -> None:
        """Take what an optimizer step showed of the blocks that trained in it.

        Args:
            squares: of each active block ||g||^2 / number of g's entries, g its gradient of the step's mean loss,
                before clipping.
        """
        raise TypeError(f"{type(self).__name__} observes no steps")

    def scores(self) -> list[float] | None:
        """What the sampler's source calls the score of each block, for the record; None where there is none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next draws depend on, made of JSON's types."""
        return {"generator": generator_state(self.generator), "last_period": self.last_period, "active": self.active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, as if the draws before it had been made here."""
        set_generator_state(self.generator, state["generator"])
        self.last_period = state["last_period"]
        self.active = list(state["active"])

    def _check_scores(self, scores: list[float], expected: int) -> None:
        if len(scores) != expected:
            raise ValueError(f"{type(self).__name__} expects {expected} scores and got {len(scores)}")
        if not all(math.isfinite(score) for score in scores):
            raise ValueError(f"a probe measured what is not finite: {scores}")


def generator_state(generator: random.Random) -> list[Any]:
    """Return the generator's state as lists, for JSON."""
    version, words, gauss = generator.getstate()
    return [version, list(words), gauss]


def set_generator_state(generator: random.Random, state: list[Any]) -> None:
    """Restore what :func:`generator_state` returned."""
    version, words, gauss = state
    generator.setstate((version, tuple(words), gauss))
