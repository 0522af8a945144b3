"""Keys of ``update.*`` and ``always_active.*``: what is trained in an active block, and outside the blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lisa_dist.config.errors import (
    UserError,
    as_written,
    check_above_zero,
    check_choices,
    check_fraction,
    check_minimums,
)


@dataclass
class UpdateConfig:
    """What every update shares, and what it supports; an update's own keys are in its subclass."""

    supports_quantized_base: ClassVar[bool] = False  # what trains is not what model.quantization stores
    supports_sharded_masters: ClassVar[bool] = True  # parallel.optimizer_shard=world
    supports_step_in_backward: ClassVar[bool] = True  # optimizer.in_backward
    trains_whole_blocks: ClassVar[bool] = False  # nothing of an active block is frozen
    is_plain: ClassVar[bool] = False  # what any trainer does: whole blocks, stepped by their own gradients

    name: str = "full_rank"  # the update; update=NAME sets it together with what belongs to it

    @property
    def reads_base(self) -> str:
        """The setting with which it reads the numbers of the frozen weights beside what trains; empty: it does not."""
        return ""

    @property
    def adapters(self) -> LoraUpdateConfig | None:
        """The settings of its adapters, where what it trains can be merged into the weights or exported by itself."""
        return None


@dataclass
class FullRankUpdateConfig(UpdateConfig):
    """Every parameter of an active block."""

    trains_whole_blocks: ClassVar[bool] = True
    is_plain: ClassVar[bool] = True

    name: str = "full_rank"


@dataclass
class LowRankUpdateConfig(UpdateConfig):
    """GaLore: Adam on gradients projected to a low rank."""

    supports_sharded_masters: ClassVar[bool] = False
    supports_step_in_backward: ClassVar[bool] = False
    trains_whole_blocks: ClassVar[bool] = True

    name: str = "low_rank"
    rank: int | None = None  # of the projections; null: preset_rank, cut to what a matrix has
    preset_rank: int = 128  # the rank where rank is null
    refresh_every: int = 200  # optimizer steps of a parameter between two projections (T)
    scale: float = 0.25  # of the update that is projected back (alpha)
    projector: str = "svd"  # svd (exact), randomized (subspace iterations from the last projection, far quicker)

    def __post_init__(self) -> None:
        check_choices("update", self, projector=["svd", "randomized"])
        check_minimums("update", self, rank=1, preset_rank=1, refresh_every=1)
        check_above_zero("update.scale", self.scale)


@dataclass
class LoraUpdateConfig(UpdateConfig):
    """LoRA: a product of two thin matrices beside every linear layer of an active block."""

    supports_quantized_base: ClassVar[bool] = True

    name: str = "lora"
    rank: int | None = None  # of the adapters; null: preset_rank, cut to what the matrices have
    preset_rank: int = 16  # the rank where rank is null
    alpha: float = 32.0  # the adapter's product is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input
    target_modules: list[str] = field(default_factory=list)  # linear layers, as q_proj; empty: all in the blocks
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # train the norm of each row of the merged weight too

    def __post_init__(self) -> None:
        check_minimums("update", self, rank=1, preset_rank=1)
        check_above_zero("update.alpha", self.alpha)
        check_fraction("update.dropout", self.dropout, below_one=True)

    @property
    def reads_base(self) -> str:
        """DoRA divides by the norms of the weights."""
        return "update.dora=true" if self.dora else ""

    @property
    def adapters(self) -> LoraUpdateConfig | None:
        """These very settings."""
        return self


@dataclass
class LoraFaUpdateConfig(LoraUpdateConfig):
    """LoRA-FA: LoRA with the first matrix frozen, and the gradient of the second corrected for it."""

    name: str = "lora_fa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dora:
            raise UserError("update.dora=true: belongs to update=lora, LoRA-FA's correction is not made for it")


UPDATE_CONFIGS: dict[str, type[UpdateConfig]] = {
    "full_rank": FullRankUpdateConfig,
    "lora": LoraUpdateConfig,
    "lora_fa": LoraFaUpdateConfig,
    "low_rank": LowRankUpdateConfig,
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
                f"always_active.embeddings={as_written(self.embeddings)} and always_active.head="
                f"{as_written(self.head)}: this model ties its head to its embeddings, so both keys must be equal"
            )
