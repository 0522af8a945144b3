"""GRASS's sampler: blocks with large gradients more often."""

from __future__ import annotations

from typing import Any

from lisa_dist.config.sampling import GradientSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_without_replacement, softmax


class GradientSampler(Sampler):
    """Draws blocks by a softmax over their mean gradient norms, which are measured again now and then.

    GRASS (arXiv 2604.07808). A probe gives for each block l the mean over some batches of
    sqrt(||g_l||^2 / N_l). The first probe sets m; each later one, every ``probe_every`` periods, moves it only
    for blocks that trained since the last:

        m_l <- smoothing * measured_l + (1 - smoothing) * m_l,      p = softmax(m / tau).

    What differs: the size of m depends on model and loss, so tau is ``temperature`` times the mean of m over the
    blocks, and one temperature fits all models. The paper counts steps between probes, here they are periods,
    for a probe belongs to a switch. Its values of tau, alpha and the number of probe steps were in no source at
    hand, so the defaults are ours. Its optimizer state in host memory is ``optimizer.state_on_freeze=offload``.
    """

    def __init__(self, config: GradientSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.temperature = config.temperature
        self.smoothing = config.smoothing
        self.probe_every = config.probe_every
        self.norms: list[float] | None = None
        self.trained_since_probe: set[int] = set()

    def wants_probe(self, period: int) -> bool:
        return period % self.probe_every == 0

    def observe(self, scores: list[float]) -> None:
        self._check_scores(scores, self.num_blocks)
        if self.norms is None:
            self.norms = list(scores)
        for block in self.trained_since_probe:
            self.norms[block] = self.smoothing * scores[block] + (1 - self.smoothing) * self.norms[block]
        self.trained_since_probe = set()

    def probabilities(self) -> list[float]:
        """Return the chance of each block to be drawn first."""
        if self.norms is None:
            raise ValueError("the first draw by gradient norms needs a probe before it")
        mean = sum(self.norms) / self.num_blocks
        if mean == 0:
            return [1 / self.num_blocks] * self.num_blocks
        return softmax([norm / (self.temperature * mean) for norm in self.norms])

    def _choose(self, period: int) -> list[int]:
        chosen = draw_without_replacement(self.generator, self.probabilities(), self.num_active)
        self.trained_since_probe.update(chosen)
        return chosen

    def scores(self) -> list[float] | None:
        """The smoothed mean gradient norms m."""
        return None if self.norms is None else list(self.norms)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norms": self.scores(), "trained_since_probe": sorted(self.trained_since_probe)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.norms = None if state["norms"] is None else list(state["norms"])
        self.trained_since_probe = set(state["trained_since_probe"])
