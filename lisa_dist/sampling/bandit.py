"""A bandit over blocks: learns from those that trained which to draw next."""

from __future__ import annotations

from typing import Any

from lisa_dist.config.method import BanditSamplerConfig
from lisa_dist.sampling.base import GRADIENT_NORMS, Sampler
from lisa_dist.sampling.draws import draw_without_replacement, softmax


class BanditSampler(Sampler):
    """Draws by exponential weights over gradient norms that are learnt only where a block has trained.

    In the manner of MISA (arXiv 2511.00056, Algorithm 1): every estimate G starts at 0, so the first draw is
    uniform; after a period the blocks that trained in it move theirs,

        G_i <- smoothing * norm_i + (1 - smoothing) * G_i,      p_i proportional to exp(eta * G_i / mean of G).

    What differs: MISA samples modules, the linear layers inside a block, up to a share of trainable parameters.
    Here the unit is the block, because a block is one FSDP2 group with one storage dtype, and a group that is
    half frozen would keep all of itself in fp32. The division by the mean makes eta a number without units. The
    norm is that of ``gradient_norms`` at the end of the period, there it is averaged over the period's steps.
    Against ``gradient``: no probe before the first draw, and what a frozen block's gradient is plays no part.
    """

    needs = GRADIENT_NORMS

    def __init__(self, config: BanditSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.eta = config.eta
        self.smoothing = config.smoothing
        self.estimates = [0.0] * num_blocks

    def wants_probe(self, period: int) -> bool:
        return period > 0

    def observe(self, scores: list[float]) -> None:
        self._check_scores(scores, self.num_blocks)
        for block in self.active:
            self.estimates[block] = self.smoothing * scores[block] + (1 - self.smoothing) * self.estimates[block]

    def probabilities(self) -> list[float]:
        """Return the chance of each block to be drawn first."""
        mean = sum(self.estimates) / self.num_blocks
        return softmax([self.eta * estimate / mean if mean else 0.0 for estimate in self.estimates])

    def _choose(self, period: int) -> list[int]:
        return draw_without_replacement(self.generator, self.probabilities(), self.num_active)

    def scores(self) -> list[float] | None:
        """The estimates G."""
        return list(self.estimates)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "estimates": list(self.estimates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.estimates = list(state["estimates"])
