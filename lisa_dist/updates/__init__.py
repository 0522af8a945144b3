"""What is updated in an active block. An update knows neither the sampler nor the sharding."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from lisa_dist.config import UpdateConfig
from lisa_dist.config.errors import UserError, nearest
from lisa_dist.updates.full_rank import FullRank


class Update(Protocol):
    """What an update must offer."""

    def prepare_model(self, model: nn.Module) -> None:
        """Change the model on ``meta``, before sharding: where adapters are put in."""

    def trainable_parameters(self, names: list[str]) -> list[str]:
        """Return which of a block's parameter names train while the block is active."""


def build_update(config: UpdateConfig) -> Update:
    """Return the update that ``update.name`` names."""
    match config.name:
        case "full_rank":
            return FullRank()
    known = ["full_rank"]
    raise UserError(f"update={config.name}: must be one of {', '.join(known)}{nearest(config.name, known)}")
