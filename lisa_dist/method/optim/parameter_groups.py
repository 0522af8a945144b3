"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from lisa_dist.config.optimization import PARTS, OptimizerConfig

# As transformers' Trainer (``get_decay_parameter_names``): every bias, and whatever is named after a norm.
LEFT_OUT = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True)
class ParameterGroups:
    """Two groups for each part of the model: what is decayed, and what is not."""

    part_of: Callable[[str], str] = lambda name: "blocks"  # from a parameter's name to one of PARTS
    undecayed: Collection[str] = ()  # names of the parameters that weight decay leaves out

    def empty(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """Return all groups, without parameters; ``part`` says whose learning rate a group has."""
        decays = (config.weight_decay, 0.0)
        return [{"params": [], "weight_decay": decay, "part": part} for part in PARTS for decay in decays]

    def index_of(self, name: str) -> int:
        """Return the index in :meth:`empty` of a parameter's group."""
        return 2 * PARTS.index(self.part_of(name)) + (name in self.undecayed)


def norms_and_biases(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of norms, and of all biases, as transformers' Trainer tells them apart."""
    inside_norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    names = [name for name, _ in model.named_parameters()]
    return frozenset(name for name in names if name in inside_norms or LEFT_OUT.search(name.lower()))
