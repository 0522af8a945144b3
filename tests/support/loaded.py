"""Models whose weights are still to be filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def allocated(config: Any) -> nn.Module:
    """A model on the CPU whose every tensor is NaN."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.tie_weights()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 0)
    return model
