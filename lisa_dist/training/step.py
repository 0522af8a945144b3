"""One optimizer step: forward and backward of each micro-batch, clipping, and the optimizer's step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lisa_dist.config.placement import is_block_major, micro_batches_together
from lisa_dist.data.batches import MicroBatch, label_tokens
from lisa_dist.method.module import TrainModule, count_persistent_bytes, observe_step, observed_blocks
from lisa_dist.method.optim.clipping import clipping_divisor, mean_norms, norms_of_squares
from lisa_dist.method.optim.schedule import learning_rates
from lisa_dist.runtime import distributed
from lisa_dist.runtime.host_copy import HostCopy
from lisa_dist.sharding import block_major
from lisa_dist.sharding.block_major import PhaseTimer
from lisa_dist.training.record import StepResult


def no_timer(part: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()


def train_step(
    train_module: TrainModule,
    micro_batches: list[MicroBatch],
    step: int,
    max_steps: int,
    stop_requested: bool = False,
    stopwatch: PhaseTimer = no_timer,
) -> StepResult:
    """Make optimizer step ``step`` (counted from 0). Collective: every rank.

    Where the loss or the gradient is not finite, the result says ``skipped`` and parameters stay as they are. Not so
    with ``optimizer.in_backward``, which changes them before that is known. The host waits for its device where an
    optimizer or an update does not leave such a step out by itself (:attr:`ActiveOptimizer.steps_on_device`), and
    where the sampler learns from the step; else it may go on while the device works.
    """
    config, dims = train_module.config, train_module.dims
    # Dropout depends on the step and the rank alone, so a resumed run draws the same.
    torch.manual_seed(hash((config.train.seed, step, dims.data_rank)) % 2**63)
    rates = learning_rates(config.scheduler, config.optimizer, step, max_steps)
    copied_before = train_module.store.link_bytes
    counts = [float(sum(map(label_tokens, micro_batches))), float(stop_requested)]
    at_once = config.optimizer.in_backward
    squares: dict[str, Tensor] = {}
    if at_once:
        loss_sum, totals, squares = step_in_backward(train_module, micro_batches, rates, counts, stopwatch)
    else:
        loss_sum, own_divisor = accumulate_gradients(train_module, micro_batches, stopwatch)
        with stopwatch("reduction of the loss"):
            totals = dims.all_reduce_sum([own_divisor, *counts])
    divisor, tokens, stops = totals
    with stopwatch("optimizer"):
        loss_sum, observed = dims.sum_on_device(loss_sum), observed_blocks(train_module)
        if at_once:
            norms = norms_of_squares(squares, list(observed.values()), dims)
        else:
            norms = step_clipped(train_module, rates, loss_sum, max(divisor, 1), observed)
        measured = HostCopy(torch.cat([loss_sum[None].to(norms.device), norms]))
    copied = train_module.store.link_bytes - copied_before
    result = StepResult(measured, max(divisor, 1), int(tokens), rates["blocks"], stops > 0, copied)
    if observed and not result.skipped:
        squares_of_blocks = {block: norm**2 for block, norm in zip(observed, result.block_norms)}
        observe_step(train_module, squares_of_blocks)
    return result


def accumulate_gradients(
    train_module: TrainModule, micro_batches: list[MicroBatch], stopwatch: PhaseTimer = no_timer
) -> tuple[Tensor, float]:
    """Add up the gradients of a global batch. Collective: every rank, with equally many micro-batches.

    Returns:
        The sum of this rank's losses, on its device, and what the objective divides it by.
    """
    if is_block_major(train_module.config.parallel, train_module.config.train):
        return accumulate_block_major(train_module, micro_batches, stopwatch)
    module = train_module.store.module
    loss_sum = torch.zeros((), device=distributed.device())
    divisor = 0.0
    for index, micro_batch in enumerate(micro_batches):
        train_module.store.defer_reduction(index < len(micro_batches) - 1)
        with stopwatch("forward"):
            loss, counted = train_module.objective(module, micro_batch)
        with stopwatch("backward"):
            loss.backward()
        loss_sum += loss.detach()
        divisor += counted
    return loss_sum, divisor


def accumulate_block_major(
    train_module: TrainModule, micro_batches: list[MicroBatch], stopwatch: PhaseTimer
) -> tuple[Tensor, float]:
    """Do the same with all micro-batches through one block at a time, which comes from host memory once for all."""
    store, objective = train_module.store, train_module.objective
    passes = [partial(objective, store.module, micro_batch) for micro_batch in micro_batches]
    store.expect_visits()
    lowest, seed = store.lowest_reached(), torch.initial_seed()  # that of the step
    losses, divisor = block_major.accumulate(
        passes, store.layers.blocks, store.visit, lowest, store.waiting_states(), seed, stopwatch
    )
    return sum(losses, start=torch.zeros((), device=distributed.device())), divisor


def step_clipped(
    train_module: TrainModule, rates: dict[str, float], loss_sum: Tensor, divisor: float, observed: dict[int, list[str]]
) -> Tensor:
    """Step by the gradients over ``divisor``, clipped to ``optimizer.grad_clip``, where they and the loss are finite.

    Collective: every rank.

    Returns:
        Their norms before clipping, float32: of all, then of each observed block, [1 + blocks].
    """
    optimizer = train_module.optimizer
    gradients = optimizer.gradients()
    blocks = [[gradients[name] for name in names if name in gradients] for names in observed.values()]
    norms = mean_norms(list(gradients.values()), divisor, blocks)
    finite = loss_sum.isfinite().to(norms.device) & norms[0].isfinite()
    optimizer.step(rates, clipping_divisor(norms[0], divisor, train_module.config.optimizer.grad_clip), finite)
    return norms


def step_in_backward(
    train_module: TrainModule,
    micro_batches: list[MicroBatch],
    rates: dict[str, float],
    counts: list[float],
    stopwatch: PhaseTimer,
) -> tuple[Tensor, list[float], dict[str, Tensor]]:
    """Step each parameter in the backward pass; its gradient dies at once, unclipped. Collective: every rank.

    Returns:
        The sum of this rank's losses; over all ranks what the objective divides it by and ``counts``; the sum of
        squares of this rank's shard of each gradient.
    """
    assert len(micro_batches) == 1, "gradients that are used at once can't be accumulated"
    with stopwatch("forward"):
        loss, divisor = train_module.objective(train_module.store.module, micro_batches[0])
    with stopwatch("reduction of the loss"):
        totals = train_module.dims.all_reduce_sum([divisor, *counts])
    with stopwatch("backward"), train_module.optimizer.stepping_in_backward(rates, max(totals[0], 1)) as made:
        loss.backward()
    return loss.detach(), totals, made.squares


def dry_run_batch(train_module: TrainModule, micro_batch: MicroBatch) -> dict[str, int]:
    """Run the longest micro-batch once, so that a run that does not fit fails in its first minute.

    Where a step's micro-batches lie in memory together, as many of them are run.

    Nothing is updated. Collective: every rank.

    Returns:
        This rank's persistent bytes by kind, counted while gradients are there.
    """
    together = micro_batches_together(train_module.config.parallel, train_module.config.train)
    accumulate_gradients(train_module, [micro_batch] * together)
    counted = count_persistent_bytes(train_module)
    train_module.optimizer.drop_gradients()
    return counted
