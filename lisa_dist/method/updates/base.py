"""What an update is: which parameters of an active block train, and what happens to their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lisa_dist.models.layer_map import LayerMap


@dataclass
class OptimizedParam:
    """A parameter that trains, with what the optimizer steps for it."""

    parameter: nn.Parameter  # the store's master; its gradient is the mean over the global batch, clipped
    stepped: nn.Parameter  # what the optimizer steps: the parameter itself, or another in its place
    extra: dict[str, Tensor] = field(default_factory=dict)  # sharded state beside the optimizer's moments, by kind
    step: int = 0  # optimizer steps since it was added, those included that the device left out by itself
    # Where the gradient of what is stepped has another basis than before: brings a moment there, the second where True.
    turn_moment: Callable[[Tensor, bool], Tensor] | None = None


class Update:
    """What is updated in an active block. The methods here are those of a full-rank update; others override them.

    An update knows neither the sampler nor how the model is sharded: it sees masters by name, as DTensors where they
    are sharded.

    Attributes:
        needs_finite_gradients: whether ``transform_gradients`` or ``apply_steps`` would do harm at a step that is left
            out, so that the host must know first whether its gradients are finite.
    """

    needs_finite_gradients = False

    def prepare_model(self, model: nn.Module, layers: LayerMap) -> None:
        """Change the model on ``meta``, before sharding: where adapters are put in."""

    def initialize(self, parameters: Mapping[str, nn.Parameter], added: list[str], seed: int) -> None:
        """Give initial values to the parameters that ``prepare_model`` added. May be collective: every rank.

        Args:
            parameters: all sharded parameters by name, those of the architecture filled.
            added: the names of the others.
            seed: of random values, which are the same at any number of ranks.
        """

    def trainable_parameters(self, names: list[str]) -> list[str]:
        """Return which of a block's parameter names train while the block is active."""
        return names

    def optimized_param(self, name: str, parameter: nn.Parameter) -> OptimizedParam:
        """Return what the optimizer steps for a parameter that begins to train, with zero state."""
        return OptimizedParam(parameter, parameter)

    def transform_gradients(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Turn the gradients of ``parameter`` into those of ``stepped``. May be collective: every rank.

        Where the basis of a target's gradient changes, its ``turn_moment`` is set for the optimizer.
        """

    def apply_steps(self, trained: Mapping[str, OptimizedParam], decay: float) -> None:
        """Carry the steps that the optimizer made on other parameters over to these. May be collective: every rank.

        Args:
            decay: the share of a parameter that its weight decay takes away (learning rate times weight decay).
        """

    def keeps_precision(self, name: str) -> bool:
        """Whether a parameter keeps the dtype of what trains while its block is frozen."""
        return False

    def describe_coverage(self, parameters: Mapping[str, nn.Parameter], layers: LayerMap) -> str | None:
        """Return a sentence on which share of the parameters the update acts on, None where it is all of a block."""
        return None

    def suppressed(self, block: nn.Module, factor: float) -> AbstractContextManager[None]:
        """Scale what a block adds to the network's hidden states by ``factor`` while the context lasts."""
        return suppressed_residual(block, factor)


@contextmanager
def suppressed_residual(block: nn.Module, factor: float) -> Iterator[None]:
    """Let ``block`` return x + factor * (block(x) - x) for hidden states x."""

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            return (torch.lerp(hidden, output[0], factor), *output[1:])
        return torch.lerp(hidden, output, factor)

    handle = block.register_forward_hook(scale, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
