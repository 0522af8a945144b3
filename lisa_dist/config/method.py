"""Keys of ``sampler.*``, ``update.*`` and ``always_active.*``: which blocks, and what in them, is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from lisa_dist.config.errors import UserError, check_at_least


@dataclass
class SamplerConfig:
    """What every sampler shares; a sampler's own keys are in its subclass."""

    name: str = "uniform"
    active_layers: int = 2  # gamma: blocks trained in a period
    period: int = 20  # K: optimizer steps between two draws
    seed: int = 0  # of the draws, apart from train.seed

    def __post_init__(self) -> None:
        check_at_least("sampler.active_layers", self.active_layers, 0)
        check_at_least("sampler.period", self.period, 1)


@dataclass
class UniformSamplerConfig(SamplerConfig):
    """LISA: uniform draws without replacement."""

    name: str = "uniform"


@dataclass
class AllSamplerConfig(SamplerConfig):
    """Every block in every period."""

    name: str = "all"


@dataclass
class FixedSamplerConfig(SamplerConfig):
    """The same listed blocks in every period."""

    name: str = "fixed"
    blocks: list[int] = field(default_factory=list)  # indices of the blocks that train, from 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.blocks)) != len(self.blocks) or any(block < 0 for block in self.blocks):
            raise UserError(f"sampler.blocks={self.blocks}: must be different block indices of at least 0")


SAMPLER_CONFIGS: dict[str, type[SamplerConfig]] = {
    "all": AllSamplerConfig,
    "fixed": FixedSamplerConfig,
    "uniform": UniformSamplerConfig,
}


@dataclass
class UpdateConfig:
    """What every update shares; an update's own keys are in its subclass."""

    name: str = "full_rank"


@dataclass
class FullRankUpdateConfig(UpdateConfig):
    name: str = "full_rank"


UPDATE_CONFIGS: dict[str, type[UpdateConfig]] = {
    "full_rank": FullRankUpdateConfig,
}


@dataclass
class AlwaysActiveConfig:
    embeddings: bool = True  # token (and position) embeddings train in every period
    norm: bool = True  # the final norm does
    head: bool = True  # the LM head does

    def check_tied(self, tied: bool) -> None:
        """Raise :class:`UserError` where tied weights would be both trained and frozen."""
        if tied and self.embeddings != self.head:
            raise UserError(
                f"always_active.embeddings={self.embeddings} and always_active.head={self.head}: this model ties "
                "its head to its embeddings, so both keys must be equal"
            )
