"""The full-rank update: every parameter of an active block is trained as it is (LISA, arXiv 2403.17919)."""

from __future__ import annotations

from lisa_dist.method.updates.base import Update


class FullRank(Update):
    """All parameters of a block train; nothing is added to the model and gradients stay as they are."""
