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
    return {name: parameter for name, (parameter, known) in _matrices(block).items() if known}


def unknown_matrices(block: nn.Module) -> list[str]:
    """Return the names in a block of what has two dimensions and may multiply hidden states in a way unknown here.

    Such are the experts of DBRX, all in one matrix, [experts x rows, columns].
    """
    return [name for name, (_, known) in _matrices(block).items() if not known]


def _matrices(block: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return each parameter that is no vector, and whether it is known how it multiplies hidden states."""
    found = {}
    for path, module in block.named_modules():
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Embedding | _ConvNd) or "norm" in kind:
            continue
        if "conv" in kind and not isinstance(module, Conv1D):  # a linear layer in spite of its name
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() in (2, 3) and not name.endswith("bias") and min(parameter.shape[-2:]) > 1:
                found[f"{path}.{name}" if path else name] = parameter, parameter.dim() == 3 or name == "weight"
    return found
