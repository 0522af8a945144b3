"""Keys of ``sampler.*``: which blocks train in a period."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lisa_dist.config.errors import UserError, check_above_zero, check_choices, check_fraction, check_minimums


@dataclass(frozen=True)
class ProbeRequest:
    """What a sampler asks of the model before it draws. ``method/probes.py`` has a function for each kind."""

    kind: str  # one of PROBE_KINDS
    batches: int = 0  # calibration micro-batches a rank, of the run's own data
    settings: dict[str, Any] = field(default_factory=dict)  # the kind's own, by name


# Kinds of probes: what each gives, and whether it reads the numbers of weights that are frozen.
PROBE_KINDS = {
    "gradient_norms": False,  # for each block sqrt(||g||^2 / its parameters), g a batch's gradient; mean over batches
    "outlier_shares": True,  # for each block the share of ||X_j||_2 |W_ij| above ``threshold`` times their mean
    "suppressed_losses": False,  # for each of ``sets`` the mean loss while its blocks give ``factor`` of what they do
    "weight_norms": True,  # for each block the l2 norm of all its parameters taken together
}


@dataclass
class SamplerConfig:
    """What every sampler shares, and what it does and needs; a sampler's own keys are in its subclass."""

    draws_once: ClassVar[bool] = False  # trains the same blocks in every period
    trains_all_blocks: ClassVar[bool] = False  # these are all blocks of the model
    observes_steps: ClassVar[bool] = False  # learns from every optimizer step

    name: str = "uniform"  # the sampler; sampler=NAME sets it together with what belongs to it
    active_layers: int | None = 2  # gamma: blocks trained in a period; only sampler=importance has a null
    period: int = 20  # K: optimizer steps between two draws
    seed: int | None = None  # of the draws; null: train.seed

    def __post_init__(self) -> None:
        check_minimums("sampler", self, active_layers=0, period=1, seed=0)

    @property
    def probe(self) -> ProbeRequest | None:
        """What it asks of the model, in the periods in which it asks; None: nothing."""
        return None

    @property
    def listed_blocks(self) -> list[int] | None:
        """The blocks that it trains, where they are known without a model."""
        return None

    @property
    def draws_non_block_modules(self) -> bool:
        """Whether embeddings and head are drawn among the blocks."""
        return False

    @property
    def idle_keys(self) -> dict[str, str]:
        """Its own keys that have no effect with its other ones, and why."""
        return {}


@dataclass
class UniformSamplerConfig(SamplerConfig):
    """LISA: uniform draws without replacement."""

    name: str = "uniform"
    non_block_modules: bool = False  # draw embeddings and head too, each as if it were a block (tied: as one)

    @property
    def draws_non_block_modules(self) -> bool:
        """Where ``sampler.non_block_modules`` says so."""
        return self.non_block_modules


@dataclass
class AllSamplerConfig(SamplerConfig):
    """Every block in every period."""

    draws_once: ClassVar[bool] = True
    trains_all_blocks: ClassVar[bool] = True

    name: str = "all"


@dataclass
class FixedSamplerConfig(SamplerConfig):
    """The same listed blocks in every period."""

    draws_once: ClassVar[bool] = True

    name: str = "fixed"
    blocks: list[int] = field(default_factory=list)  # indices of the blocks that train, from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.blocks)) != len(self.blocks) or any(block < 0 for block in self.blocks):
            raise UserError(f"sampler.blocks={self.blocks}: must be different block indices of at least 0")

    @property
    def listed_blocks(self) -> list[int] | None:
        """Those of ``sampler.blocks``."""
        return self.blocks


@dataclass
class WeightedSamplerConfig(SamplerConfig):
    """Draws in proportion to a weight for each block."""

    name: str = "weighted"
    law: str = "increasing"  # increasing, decreasing, given, weight_norm, weight_norm_ratio
    weights: list[float] = field(default_factory=list)  # for given: a weight a block; for weight_norm_ratio: w~

    def __post_init__(self) -> None:
        super().__post_init__()
        laws = ["increasing", "decreasing", "given", "weight_norm", "weight_norm_ratio"]
        check_choices("sampler", self, law=laws)
        reads_weights = self.law in ("given", "weight_norm_ratio")
        if reads_weights != bool(self.weights):
            raise UserError(
                f"sampler.weights={self.weights}: sampler.law={self.law} "
                + ("needs one number for each block" if reads_weights else "reads no weights; leave it out")
            )
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise UserError(f"sampler.weights={self.weights}: must be finite and must not be negative")

    @property
    def probe(self) -> ProbeRequest | None:
        """The norms of the model's weights, where the law is one of theirs."""
        return ProbeRequest("weight_norms") if self.law in ("weight_norm", "weight_norm_ratio") else None


@dataclass
class SweepSamplerConfig(SamplerConfig):
    """BAdam: the blocks in turn, each once a sweep."""

    name: str = "sweep"
    order: str = "descending"  # ascending, descending, random (anew each sweep), given
    sequence: list[int] = field(default_factory=list)  # for given: every block's index once

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("sampler", self, order=["ascending", "descending", "random", "given"])
        if (self.order == "given") != bool(self.sequence):
            raise UserError(
                f"sampler.sequence={self.sequence}: sampler.order={self.order} "
                + ("needs every block's index once" if self.order == "given" else "reads no sequence; leave it out")
            )

    @property
    def idle_keys(self) -> dict[str, str]:
        """The seed, but for a random order."""
        return {} if self.order == "random" else {"seed": "only sampler.order=random draws at random"}


@dataclass
class CoverageSamplerConfig(SamplerConfig):
    """Random draws that leave no block out for long."""

    name: str = "coverage"
    window: int | None = None  # any so many periods in a row train every block; null: twice the fewest possible

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimums("sampler", self, window=1, active_layers=1)


@dataclass
class GradientSamplerConfig(SamplerConfig):
    """GRASS: blocks with large gradients are drawn more often."""

    name: str = "gradient"
    temperature: float = 1.0  # of the softmax over norms relative to their mean; large: nearly uniform
    probe_every: int = 5  # periods between two probes
    probe_batches: int = 1  # micro-batches a rank that a probe averages over
    smoothing: float = 0.5  # share of the new norm in a trained block's estimate

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("sampler.temperature", self.temperature)
        check_minimums("sampler", self, probe_every=1, probe_batches=1)
        check_fraction("sampler.smoothing", self.smoothing)

    @property
    def probe(self) -> ProbeRequest | None:
        """The gradient norm of each block."""
        return ProbeRequest("gradient_norms", self.probe_batches)


@dataclass
class OutlierSamplerConfig(SamplerConfig):
    """OwLore: blocks with many outliers are drawn more often."""

    name: str = "outlier"
    threshold: float = 13.0  # M: an entry is an outlier above so many times the mean
    reverse: bool = False  # draw blocks with few outliers more often
    probe_batches: int = 4  # calibration micro-batches a rank, of the run's own data

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero("sampler.threshold", self.threshold)
        check_minimums("sampler", self, probe_batches=1)

    @property
    def probe(self) -> ProbeRequest | None:
        """The outliers of each block, among inputs times weights."""
        return ProbeRequest("outlier_shares", self.probe_batches, {"threshold": self.threshold})


@dataclass
class ImportanceSamplerConfig(SamplerConfig):
    """IST: blocks whose suppression costs loss are drawn more often."""

    name: str = "importance"
    active_layers: int | None = None  # null: a quarter of the blocks
    probe_every: int = 1  # periods between two probes
    probe_batches: int = 1  # micro-batches a rank on which each set is scored
    suppressed_sets: int = 3  # sets of blocks that a probe compares
    suppressed_share: float = 0.5  # of the blocks, in each set
    suppression_factor: float = 0.25  # what remains of a suppressed block's adapter
    score_lr: float = 10.0  # step size of the scores

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimums("sampler", self, probe_every=1, probe_batches=1, suppressed_sets=2)
        check_fraction("sampler.suppressed_share", self.suppressed_share, below_one=True)
        check_fraction("sampler.suppression_factor", self.suppression_factor, below_one=True)
        check_above_zero("sampler.score_lr", self.score_lr)

    @property
    def probe(self) -> ProbeRequest | None:
        """The losses while sets of blocks are suppressed; which sets, the sampler adds when it asks."""
        return ProbeRequest("suppressed_losses", self.probe_batches, {"factor": self.suppression_factor})


@dataclass
class BanditSamplerConfig(SamplerConfig):
    """In the manner of MISA: learns from the training steps which blocks to draw more often."""

    observes_steps: ClassVar[bool] = True

    name: str = "bandit"
    eta: float = 1.0  # of the exponential weights over squared norms relative to their mean; 0: uniform
    smoothing: float = 0.2  # share of a step's squared norm in a trained block's moving average

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimums("sampler", self, eta=0)
        check_fraction("sampler.smoothing", self.smoothing)

    @property
    def idle_keys(self) -> dict[str, str]:
        """The smoothing of estimates that nothing is drawn by."""
        return {"smoothing": "with sampler.eta=0 gradients count for nothing"} if self.eta == 0 else {}


SAMPLER_CONFIGS: dict[str, type[SamplerConfig]] = {
    "all": AllSamplerConfig,
    "bandit": BanditSamplerConfig,
    "coverage": CoverageSamplerConfig,
    "fixed": FixedSamplerConfig,
    "gradient": GradientSamplerConfig,
    "importance": ImportanceSamplerConfig,
    "outlier": OutlierSamplerConfig,
    "sweep": SweepSamplerConfig,
    "uniform": UniformSamplerConfig,
    "weighted": WeightedSamplerConfig,
}
