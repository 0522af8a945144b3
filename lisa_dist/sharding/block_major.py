"""All micro-batches of a step pass through a block while its weights are there: they are copied once a step.

The model's own forward is left alone. It runs for each micro-batch with stubs in place of the blocks, which note what
each block is called with; then each block runs for all micro-batches, one block after the other; then the forward runs
again, with what came out of the blocks as the last stub's answer, for norm, head and loss. The backward pass goes the
same way round. Blocks run without a graph and keep their inputs alone, on the device or in host memory; on the way back
each is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lisa_dist.config import UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.models.tiny_copy import NoTinyCopyError
from lisa_dist.sharding.tried_gradients import ModelPass, what_differs
from lisa_dist.sharding.waiting_states import StatesOnDevice, WaitingStates

Visit = Callable[[int], AbstractContextManager[Callable[..., Any]]]  # a block's weights are there; gives its forward
PhaseTimer = Callable[[str], AbstractContextManager[None]]  # names the part of a step that its body is
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with beside the hidden states


class _LastBlockReachedError(Exception):
    """Ends a forward pass that was made for what blocks are called with."""


def accumulate(
    passes: Sequence[ModelPass],
    blocks: Sequence[nn.Module],
    visit: Visit,
    lowest: int,
    waiting: WaitingStates,
    seed: int | None = None,
    stopwatch: PhaseTimer = lambda part: nullcontext(),
) -> tuple[list[Tensor], float]:
    """Make the forward and the backward pass of all micro-batches; the gradients are added at the parameters.

    Args:
        passes: of the micro-batches, each through the whole model.
        blocks: of the model, each called once in a pass, with the hidden states first, and answering with them alone.
        visit: is entered once for each block upwards, and once downwards where gradients reach it.
        lowest: the lowest block that gradients reach, by what trains in blocks; where what enters the first one has a
            graph they reach all.
        waiting: where inputs of blocks wait until the backward pass.
        seed: dropout is keyed by it, the micro-batch and the block; None: nothing draws.
        stopwatch: times ``forward`` and ``backward``.

    Returns:
        The loss of each micro-batch, and the sum of what divides them.
    """
    top, draw_for = len(blocks), partial(_draw_for, seed)
    entered: list[GradientEdge | None] = []  # the graph of what enters the first block, without its values
    states: list[Tensor] = []
    calls: list[list[Call]] = []
    with stopwatch("forward"):
        for micro_batch, run in enumerate(passes):
            draw_for(micro_batch, -1)
            state, noted = _note_calls(run, blocks)
            entered.append(get_gradient_edge(state) if state.requires_grad else None)
            states.append(state.detach())
            calls.append(noted)
    if any(edge is not None for edge in entered):
        lowest = 0
    for block in range(top):
        with stopwatch("forward"), torch.no_grad(), visit(block) as forward:
            for micro_batch, of_blocks in enumerate(calls):
                args, kwargs = of_blocks[block]
                if block >= lowest:
                    waiting.put(block, micro_batch, states[micro_batch])
                draw_for(micro_batch, block)
                states[micro_batch] = forward(states[micro_batch], *args, **kwargs)
                if not isinstance(states[micro_batch], Tensor):
                    raise TypeError("its blocks answer with more than the hidden states")
    losses, divisor = [], 0.0
    for micro_batch, run in enumerate(passes):
        state = states[micro_batch].requires_grad_(lowest < top)
        draw_for(micro_batch, top)
        with stopwatch("forward"), _answering(blocks, [_pass_on] * (top - 1) + [partial(_answer, state)]):
            loss, counted = run()
        with stopwatch("backward"):
            loss.backward()
        losses.append(loss.detach())
        divisor += counted
        if state.grad is not None:  # takes the state's place
            states[micro_batch] = state.grad
    for block in reversed(range(lowest, top)):
        with stopwatch("backward"), visit(block) as forward:
            for micro_batch, of_blocks in enumerate(calls):
                args, kwargs = of_blocks[block]
                needs_grad = block > lowest or entered[micro_batch] is not None
                state = waiting.take(block, micro_batch).detach().requires_grad_(needs_grad)
                draw_for(micro_batch, block)
                forward(state, *args, **kwargs).backward(states[micro_batch])
                if state.grad is not None:
                    states[micro_batch] = state.grad
    with stopwatch("backward"):
        for edge, gradient in zip(entered, states):
            if edge is not None:
                torch.autograd.backward(edge, gradient)
    return losses, divisor


def _draw_for(seed: int | None, micro_batch: int, block: int) -> None:
    if seed is not None:
        torch.manual_seed(hash((seed, micro_batch, block)) % 2**63)


def _note_calls(run: ModelPass, blocks: Sequence[nn.Module]) -> tuple[Tensor, list[Call]]:
    """Return the hidden states that enter the first block, with their graph, and what each block is called with."""
    states: list[Tensor] = []
    calls: list[Call] = []

    def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
            raise TypeError("gradients pass into its blocks by more than the hidden states")
        states.append(hidden_states)
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _LastBlockReachedError
        return hidden_states

    try:
        with _answering(blocks, [note] * len(blocks)):
            run()
    except _LastBlockReachedError:
        pass
    return states[0], calls


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _answer(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return state


@contextmanager
def _answering(blocks: Sequence[nn.Module], stubs: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """Have stubs answer for the blocks while the context lasts."""
    originals = [block.forward for block in blocks]
    for block, stub in zip(blocks, stubs):
        block.forward = stub
    try:
        yield
    finally:
        for block, original in zip(blocks, originals):
            block.forward = original


def check_block_major(model: nn.Module, blocks_path: str) -> None:
    """Raise :class:`UserError` where a model's losses and gradients are others in this order, by a tiny copy of it.

    Args:
        model: as transformers builds it, on any device, without adapters.
        blocks_path: the dotted path of its stack of blocks.
    """
    refused = f"parallel.block_major=true: {type(model).__name__}"
    remedy = "set parallel.block_major=false"

    def block_by_block(passes: Sequence[ModelPass], blocks: Sequence[nn.Module]) -> list[Tensor]:
        return accumulate(passes, blocks, lambda block: nullcontext(blocks[block].forward), 0, StatesOnDevice())[0]

    try:
        differs = what_differs(model, blocks_path, block_by_block)
    except NoTinyCopyError as error:
        raise UserError(
            f"{refused} can't be tried in this order, since no tiny copy of it can be built ({error}); {remedy}"
        ) from error
    except Exception as error:  # whatever a foreign forward pass raises
        raise UserError(
            f"{refused} can't pass one block at a time: a tiny copy of it gives {type(error).__name__}: "
            f"{in_one_line(error)}; {remedy}"
        ) from error
    if differs:
        raise UserError(
            f"{refused} gets other losses or gradients, as of {differs}, where all micro-batches pass one block at a "
            f"time, as where blocks share keys and values, or inputs of each layer are made before them; {remedy}"
        )
