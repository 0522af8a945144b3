"""Which parameters weight decay leaves out."""

from __future__ import annotations

import re

from torch import nn

# As transformers' Trainer (``get_decay_parameter_names``): every bias, and whatever is named after a norm.
LEFT_OUT = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


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
