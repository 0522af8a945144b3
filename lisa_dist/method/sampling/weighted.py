"""Draws in proportion to a weight for each block."""

from __future__ import annotations

from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sampling import WeightedSamplerConfig
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_without_replacement


class WeightedSampler(Sampler):
    """Draws blocks without replacement in proportion to weights (see ``draw_without_replacement`` for the law).

    The weight of block i of n, by ``sampler.law``:

    * ``increasing``: i + 1, and ``decreasing``: n - i (two baselines of OwLore, arXiv 2405.18380);
    * ``given``: ``sampler.weights[i]``;
    * ``weight_norm``: w_i, the l2 norm of the block's parameters, averaged over the periods so far;
    * ``weight_norm_ratio``: w~_i / w_i, LISA's equation (arXiv 2403.17919) before it is reduced to a constant:
      w~ are the mean norms of a run to imitate, given as ``sampler.weights``, and w this run's own. LISA took
      w from a finished LoRA run and w~ from a full one, w here grows with the run; and where LISA's ratio is a
      block's own chance to train, exactly ``active_layers`` blocks are drawn here.
    """

    def __init__(self, config: WeightedSamplerConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        if config.weights and len(config.weights) != num_blocks:
            raise UserError(
                f"sampler.weights={config.weights}: must be {num_blocks} numbers, one for each block of this model"
            )
        positive = sum(weight > 0 for weight in config.weights)
        if config.weights and positive < self.num_active:
            raise UserError(
                f"sampler.weights={config.weights}: only {positive} are above 0, "
                f"fewer than sampler.active_layers={self.num_active}"
            )
        self.law = config.law
        self.given = list(config.weights)
        self.norm_sums = [0.0] * num_blocks
        self.observations = 0

    def wants_probe(self, period: int) -> bool:
        return self.probe is not None

    def observe(self, scores: list[float]) -> None:
        self._check_scores(scores, self.num_blocks)
        self.norm_sums = [total + score for total, score in zip(self.norm_sums, scores)]
        self.observations += 1

    def weights(self) -> list[float]:
        """Return the weight of each block in the next draw."""
        n = self.num_blocks
        match self.law:
            case "increasing":
                return [float(i + 1) for i in range(n)]
            case "decreasing":
                return [float(n - i) for i in range(n)]
            case "given":
                return self.given
        norms = self.scores()
        if norms is None:
            raise ValueError("the first draw by weight norms needs a probe before it")
        if self.law == "weight_norm":
            return norms
        return [target / norm for target, norm in zip(self.given, norms)]

    def _choose(self, period: int) -> list[int]:
        return draw_without_replacement(self.generator, self.weights(), self.num_active)

    def scores(self) -> list[float] | None:
        """The weight norms w, averaged over the periods so far, where the law reads them."""
        return [total / self.observations for total in self.norm_sums] if self.observations else None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norm_sums": self.norm_sums, "observations": self.observations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.norm_sums, self.observations = list(state["norm_sums"]), state["observations"]
