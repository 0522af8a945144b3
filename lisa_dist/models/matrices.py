"""The weight matrices of a block: of linear layers, of routers, and of experts that are fused into one parameter."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


def weight_matrices(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that multiply hidden states, by their names in it.

    These are the weights of linear layers, [outputs, inputs] (GPT-2's [inputs, outputs]); of routers, which
    transformers keeps as a bare ``weight``, [experts, inputs]; and of fused experts, [experts, rows, columns].
    Norms, biases (those of experts have two dimensions), convolutions, embeddings, and matrices with a single row or
    column are none.
    """
    found = {}
    for path, module in block.named_modules():
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Embedding | _ConvNd) or "norm" in kind:
            continue
        if "conv" in kind and not isinstance(module, Conv1D):  # a linear layer in spite of its name
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = (parameter.dim() == 2 and name == "weight") or parameter.dim() == 3
            if is_matrix and not name.endswith("bias") and min(parameter.shape[-2:]) > 1:
                found[f"{path}.{name}" if path else name] = parameter
    return found
