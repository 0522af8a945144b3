"""The full-rank update: every parameter of an active block is trained as it is (LISA, arXiv 2403.17919)."""

from __future__ import annotations

from torch import nn


class FullRank:
    """All parameters of a block train; nothing is added to the model and gradients stay as they are."""

    def prepare_model(self, model: nn.Module) -> None:
        """Leave the model as it is."""

    def trainable_parameters(self, names: list[str]) -> list[str]:
        """Return which of a block's parameter names train in an active block: all."""
        return names
