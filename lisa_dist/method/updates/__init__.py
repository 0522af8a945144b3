"""What is updated in an active block: adapters, projected gradients, or all of it; one file an update.

An update knows neither the sampler nor how the model is sharded: it sees masters by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lisa_dist.config import UpdateConfig
from lisa_dist.method.updates.base import OptimizedParam, Update
from lisa_dist.method.updates.full_rank import FullRank
from lisa_dist.method.updates.lora import Lora, LoraFa
from lisa_dist.method.updates.low_rank import LowRank

__all__ = ["OptimizedParam", "Update", "build_update"]

UPDATES: dict[str, Callable[[Any], Update]] = {
    "full_rank": lambda config: FullRank(),
    "lora": Lora,
    "lora_fa": LoraFa,
    "low_rank": LowRank,
}


def build_update(config: UpdateConfig) -> Update:
    """Return the update that ``config`` describes."""
    return UPDATES[config.name](config)
