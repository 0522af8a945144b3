"""IST's sampler: blocks whose suppression costs loss more often."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sampling import ImportanceSamplerConfig, ProbeRequest
from lisa_dist.method.sampling.base import Sampler
from lisa_dist.method.sampling.draws import draw_without_replacement, sigmoid


class ImportanceSampler(Sampler):
    """Learns from response suppression which blocks matter, and draws these more often.

    IST (arXiv 2410.11772, https://github.com/antgroup/importance-aware-sparse-tuning-IST-paper, ``ist.py``). Each
    block has a score s_i, 0 at first, that grows where the block turns out *un*important. A probe draws K
    different sets of blocks, each in proportion to sigma(s) without replacement, scales the adapters of a set's
    blocks by ``suppression_factor`` and measures the loss. With r_k = exp(-loss_k) minus its mean over the sets,

        s_i <- s_i + score_lr * sum over the sets k with i of  r_k * sigma(s_i) * (1 - sigma(s_i)),

    sigma(s_i) taken before the update. Blocks train in proportion to sigma(-s), a quarter of them by default.

    What differs: blocks are drawn anew each period, there each step; the loss of a set is over the batches of
    all ranks, there each rank's own; and scores, generator and the sets under test are part of the state.
    """

    def __init__(self, config: ImportanceSamplerConfig, num_blocks: int) -> None:
        quarter = max(1, num_blocks // 4)
        super().__init__(config, num_blocks, quarter if config.active_layers is None else config.active_layers)
        self.probe_every = config.probe_every
        self.score_lr = config.score_lr
        self.num_sets = config.suppressed_sets
        self.set_size = max(1, int(num_blocks * config.suppressed_share))
        if math.comb(num_blocks, self.set_size) < self.num_sets:
            raise UserError(
                f"sampler.suppressed_sets={self.num_sets}: must be at most {math.comb(num_blocks, self.set_size)}, "
                f"the number of different sets of {self.set_size} of the {num_blocks} blocks of this model"
            )
        self.unimportance = [0.0] * num_blocks
        self.sets: list[list[int]] = []  # drawn and not yet scored

    def wants_probe(self, period: int) -> bool:
        return period > 0 and period % self.probe_every == 0

    def request(self) -> ProbeRequest:
        """Return the configured request for ``suppressed_sets()``."""
        request = super().request()
        return replace(request, settings={**request.settings, "sets": self.suppressed_sets()})

    def suppressed_sets(self) -> list[list[int]]:
        """Return the sets whose losses ``observe`` expects next, sorted and all different."""
        while len(self.sets) < self.num_sets:
            weights = [sigmoid(score) for score in self.unimportance]
            candidate = sorted(draw_without_replacement(self.generator, weights, self.set_size))
            if candidate not in self.sets:
                self.sets.append(candidate)
        return [list(blocks) for blocks in self.sets]

    def observe(self, scores: list[float]) -> None:
        """Take the loss of each of ``suppressed_sets()``, in nats a token."""
        self._check_scores(scores, len(self.sets))
        returns = [math.exp(-loss) for loss in scores]
        mean = sum(returns) / len(returns)
        updated = list(self.unimportance)
        for blocks, value in zip(self.sets, returns):
            for block in blocks:
                chance = sigmoid(self.unimportance[block])
                updated[block] += self.score_lr * (value - mean) * chance * (1 - chance)
        self.unimportance = updated
        self.sets = []

    def _choose(self, period: int) -> list[int]:
        weights = [sigmoid(-score) for score in self.unimportance]
        return draw_without_replacement(self.generator, weights, self.num_active)

    def scores(self) -> list[float] | None:
        """The scores s: the larger, the less important a block."""
        return list(self.unimportance)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "unimportance": list(self.unimportance), "sets": list(self.sets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.unimportance = list(state["unimportance"])
        self.sets = [list(blocks) for blocks in state["sets"]]
