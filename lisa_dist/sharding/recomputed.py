"""A block's forward pass that keeps nothing but its arguments, and is made again in the backward pass.

Unlike torch's checkpointing the whole pass with its backward is made within one visit to the block: no saved tensor
outlives it, so that the weights may lie where another block's lie before and after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lisa_dist.config import UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.models.tiny_copy import NoTinyCopyError
from lisa_dist.sharding.tried_gradients import ModelPass, in_turn, what_differs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """A nest of arguments or results without its tensors."""

    leaves: list[tuple[bool, Any]]  # whether there is a tensor, else what there is
    spec: TreeSpec

    def filled(self, tensors: Iterable[Tensor]) -> Any:
        """Return the nest with these tensors in it."""
        given = iter(tensors)
        return tree_unflatten([next(given) if is_tensor else leaf for is_tensor, leaf in self.leaves], self.spec)


def take_apart(nest: Any) -> tuple[list[Tensor], Form]:
    """Return the tensors of a nest, and what remains."""
    leaves, spec = tree_flatten(nest)
    form = Form([(True, None) if isinstance(leaf, Tensor) else (False, leaf) for leaf in leaves], spec)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], form


@dataclass
class Pass:
    """One forward pass of a block: what is needed to make it again."""

    forward: Callable[..., Any]
    visit: Callable[[], AbstractContextManager[Sequence[Tensor]]]  # gives what trains of the block, as it is used then
    device: torch.device  # that computes
    arguments: Form
    result: Form | None = None
    random: list[Tensor] = field(default_factory=list)  # the states of the generators that it draws from

    def run(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Make the pass with these tensors as arguments; return those of the result."""
        args, kwargs = self.arguments.filled(tensors)
        found, self.result = take_apart(self.forward(*args, **kwargs))
        return found

    def again(
        self,
        trained: Sequence[Tensor],
        arguments: Sequence[Tensor],
        gradients: Iterable[Tensor | None],
        needed: Iterable[bool],
    ) -> list[Tensor | None]:
        """Make the pass again with a graph; return the gradients of what trains and of the arguments, in their order.

        Args:
            trained: what trains, where its gradients are to be.
            arguments: the tensors among the arguments.
            gradients: of the tensors of the result, None where there is none.
            needed: of what trains and each argument whether it needs a gradient.
        """
        copies = [argument.detach().requires_grad_(argument.requires_grad) for argument in arguments]
        with _drawing_from(self.random, self.device), torch.enable_grad(), self.visit() as there:
            inputs = [*there, *copies]
            wanted = [place for place, is_needed in enumerate(needed) if is_needed]
            tensors, received = [], []
            for tensor, gradient in zip(self.run(copies), gradients):
                if gradient is not None and tensor.requires_grad:
                    tensors.append(tensor)
                    received.append(gradient)
            found = torch.autograd.grad(
                tensors,
                [inputs[place] for place in wanted],
                received,
                allow_unused=True,  # an expert that was sent no token has none
            )
        result: list[Tensor | None] = [None] * len(inputs)
        for place, gradient in zip(wanted, found):
            is_parameters = gradient is not None and place < len(trained)
            result[place] = gradient.to(trained[place].device) if is_parameters else gradient
        return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Pass, num_trained: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.made, ctx.trained = made, tensors[:num_trained]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_trained:])
        made.random = [torch.get_rng_state()]
        if made.device.type == "cuda":
            made.random.append(torch.cuda.get_rng_state(made.device))
        with made.visit():
            return tuple(made.run(tensors[num_trained:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        made: Pass = ctx.made
        found = made.again(ctx.trained, ctx.saved_tensors, gradients, ctx.needs_input_grad[2:])
        return None, None, *found


def recompute(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trained: Sequence[Tensor],
    visit: Callable[[], AbstractContextManager[Sequence[Tensor]]],
    device: torch.device,
) -> Any:
    """Return what ``forward`` returns; its backward pass makes it again. Without any gradient it is made as it is.

    Args:
        forward: of a block.
        args: its arguments.
        kwargs: its arguments.
        trained: parameters of the block that have gradients. They are inputs of the graph: else adapters over frozen
            embeddings, where no argument requires grad, would not train.
        visit: a context in which the weights are where they are used; gives ``trained`` as it is used there.
        device: that computes.
    """
    if torch.is_grad_enabled():
        tensors, form = take_apart((args, kwargs))
        if any(tensor.requires_grad for tensor in [*trained, *tensors]):
            made = Pass(forward, visit, device, form)
            found = _Recomputed.apply(made, len(trained), *trained, *tensors)
            assert made.result is not None
            return made.result.filled(found)
    with torch.no_grad(), visit():
        return forward(*args, **kwargs)


def check_recomputed(model: nn.Module, blocks_path: str) -> None:
    """Raise :class:`UserError` where blocks that are computed again give other gradients, by a tiny copy of the model.

    As where keys and values of one serve others (Gemma 3n): what passes beside arguments and results has no graph.

    Args:
        model: as transformers builds it, on any device, without adapters.
        blocks_path: the dotted path of its stack of blocks.
    """
    key, name = "parallel.offload=frozen or auto on one rank", type(model).__name__
    remedy = "set parallel.offload=none or all"
    try:
        differs = what_differs(model, blocks_path, _again)
    except NoTinyCopyError as error:
        logger.warning("%s: gradients of %s can't be tried, no tiny copy of it can be built (%s)", key, name, error)
        return
    except Exception as error:  # whatever a foreign forward pass raises
        raise UserError(
            f"{key}: a tiny copy of {name}, whose blocks are computed again for their gradients, gives "
            f"{type(error).__name__}: {in_one_line(error)}; {remedy}"
        ) from error
    if differs:
        raise UserError(
            f"{key}: {name} gets other gradients, as of {differs}, where its blocks are computed again for them, as "
            f"where blocks share keys and values; {remedy}"
        )


def _again(passes: Sequence[ModelPass], blocks: Sequence[nn.Module]) -> list[Tensor]:
    for block in blocks:
        block.forward = partial(_recomputing, block, block.forward)
    return in_turn(passes)


def _recomputing(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    trained = list(block.parameters())
    return recompute(forward, args, kwargs, trained, lambda: nullcontext(trained), torch.device("cpu"))


@contextmanager
def _drawing_from(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw from these states while the context lasts, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)
        yield
