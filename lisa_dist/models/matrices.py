"""The weight matrices of a block (of linear layers, routers, and fused experts), and what goes into them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lisa_dist.models.layer_map import LayerMap


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


class InputSquares:
    """Sums of squares of each input of each weight matrix, over the tokens of forward passes; adapters are left out.

    Attributes:
        squares: by the parameter's name, [inputs], of fused experts [experts, inputs].
        unseen: what is left out, because its inputs are not found.
        kept: [rows, tokens] of the batch that comes, 0 for those that do not count; to be set before each pass.
    """

    def __init__(self, layers: LayerMap, device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.squares: dict[str, Tensor] = {}
        self.unseen: set[str] = set()
        self.kept = torch.ones(())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what forward passes within the context put in."""
        handles = []
        for block_name, block in zip(self.layers.block_names, self.layers.blocks):
            for inside, weight in weight_matrices(block).items():
                path, _, own_name = inside.rpartition(".")
                module = block.get_submodule(path)
                if ".lora_" in f".{inside}":
                    continue
                if weight.dim() == 3 and not shows_inputs(module):
                    self.unseen.add(f"{type(module).__name__}.{own_name}")
                    continue
                shape = (*weight.shape[:-2], weight.shape[input_dim(module)])
                self.squares[f"{block_name}.{inside}"] = torch.zeros(shape, device=self.device)
                if weight.dim() == 2:
                    handles.append(self._watch(module, f"{block_name}.{inside}"))
                elif own_name == "down_proj":  # one hook sees all matrices of the experts
                    handles.append(self._watch_experts(module, f"{block_name}.{path}"))
            for path, _, own_name in (name.rpartition(".") for name in unknown_matrices(block)):
                self.unseen.add(f"{type(block.get_submodule(path)).__name__}.{own_name}")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, module: nn.Module, name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in self.squares or not args or args[0].shape[-1] != self.squares[name].numel():
                self.squares.pop(name, None)
                self.unseen.add(f"{type(module).__name__}.{name.rpartition('.')[2]}")
                return
            inputs = args[0].detach().float()
            if inputs.shape[:-1].numel() == self.kept.numel():  # experts by themselves see tokens in another order
                inputs = inputs * self.kept.reshape(*inputs.shape[:-1], 1)
            self.squares[name] += inputs.flatten(0, -2).square().sum(0)

        return module.register_forward_pre_hook(see)

    def _watch_experts(self, module: nn.Module, path: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, expert, inputs in expert_inputs(module, args, kwargs, self.kept.flatten()):
                self.squares[f"{path}.{name}"][expert] += inputs.detach().float().square().sum(0)

        return module.register_forward_pre_hook(see, with_kwargs=True)


def input_dim(module: nn.Module) -> int:
    """Return which dimension of a module's weights counts inputs: the last, in GPT-2 and gpt-oss the one before."""
    return -2 if isinstance(module, Conv1D) or getattr(module, "is_transposed", False) else -1


def shows_inputs(module: nn.Module) -> bool:
    """Whether the inputs of a module's fused experts can be found: it is laid out as transformers' kernels expect.

    These modules say so by the attributes that ``transformers.integrations.moe.use_experts_implementation`` gives them.
    """
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj"))


def expert_inputs(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kept: Tensor
) -> Iterator[tuple[str, int, Tensor]]:
    """Compute what each matrix of each expert is given, from the arguments of a forward pass about to begin.

    Args:
        module: of :func:`shows_inputs`, its parameters gathered.
        args, kwargs: hidden states [tokens, inputs], the experts of each token [tokens, experts a token], and more.
        kept: [tokens], not 0 for those that count.

    Yields:
        the parameter's name in the module, the expert, and its inputs, [tokens of that expert, inputs].
    """
    hidden, index = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())[:2]
    up = "gate_up_proj" if module.has_gate else "up_proj"
    for expert in range(len(module.down_proj)):
        chosen = (index == expert).any(-1) & (kept != 0)
        inputs = hidden[chosen]
        yield up, expert, inputs
        weight = getattr(module, up)[expert]
        bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else None
        outputs = functional.linear(inputs, weight.T if module.is_transposed else weight, bias)
        yield "down_proj", expert, module._apply_gate(outputs) if module.has_gate else module.act_fn(outputs)
