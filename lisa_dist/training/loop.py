"""The training loop.

At a period's first step switch the active blocks; then accumulate micro-batches, clip, step, record;
checkpoint on schedule or on a signal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, Config, UserError
from lisa_dist.config.checks import check_accumulation, options_without_effect
from lisa_dist.data.batches import MicroBatch, label_tokens
from lisa_dist.method.module import (
    TrainModule,
    begin_period,
    count_persistent_bytes,
    count_trained_parameters,
    observe_step,
    observed_blocks,
)
from lisa_dist.method.optim.clipping import normalize_and_clip
from lisa_dist.method.optim.schedule import learning_rates
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now
from lisa_dist.runtime.signals import ignore_stop_signals, stop_requested
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.telemetry.out_of_memory import PREPARATION, explaining_out_of_memory
from lisa_dist.training.evaluation import evaluate, show_answers
from lisa_dist.training.flops import peak_rate, step_flops
from lisa_dist.training.recovery import is_spike, remember_loss, roll_back, skip_nonfinite_step
from lisa_dist.training.setup import Run, announce_trained, forget_start, open_run_directory, prepare_run

logger = logging.getLogger(__name__)

PhaseTimer = Callable[[str], AbstractContextManager[None]]  # names the part of a step that its body is


@dataclass
class StepResult:
    """What one optimizer step found, equal on every rank."""

    loss: float  # mean over the label tokens of the global batch
    grad_norm: float  # before clipping
    tokens: int  # label tokens of the global batch
    lr: float
    stop_requested: bool  # a rank was asked to stop
    skipped: bool = False  # the loss or the gradient was not finite


def no_timer(part: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()


def accumulate_gradients(
    train_module: TrainModule, micro_batches: list[MicroBatch], stopwatch: PhaseTimer = no_timer
) -> tuple[float, int]:
    """Add up the gradients of a global batch. Collective: every rank, with equally many micro-batches.

    Returns:
        This rank's loss, summed over its label tokens, and their number.
    """
    module = train_module.store.module
    loss_sum = torch.zeros((), device=distributed.device())
    tokens = 0
    for index, micro_batch in enumerate(micro_batches):
        if train_module.config.parallel.defer_reduction:
            train_module.store.defer_reduction(index < len(micro_batches) - 1)
        tokens += label_tokens(micro_batch)
        inputs = {key: tensor.to(loss_sum.device, non_blocking=True) for key, tensor in micro_batch.items()}
        with stopwatch("forward"):
            loss = module(**inputs)
        with stopwatch("backward"):
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum.item(), tokens


def train_step(
    train_module: TrainModule,
    micro_batches: list[MicroBatch],
    step: int,
    max_steps: int,
    stop_requested: bool = False,
    stopwatch: PhaseTimer = no_timer,
) -> StepResult:
    """Make optimizer step ``step`` (counted from 0). Collective: every rank.

    Where the loss or the gradient is not finite, parameters stay as they are and the result says ``skipped``.
    """
    config = train_module.config
    # Dropout depends on the step and the rank alone, so a resumed run draws the same.
    torch.manual_seed(hash((config.train.seed, step, train_module.dims.data_rank)) % 2**63)
    if config.optimizer.in_backward:
        return step_in_backward(train_module, micro_batches, step, max_steps, stop_requested, stopwatch)
    local_loss, local_tokens = accumulate_gradients(train_module, micro_batches, stopwatch)
    with stopwatch("reduction of the loss"):
        loss_sum, tokens, stops = train_module.dims.all_reduce_sum([local_loss, local_tokens, float(stop_requested)])
    rates = learning_rates(config.scheduler, config.optimizer, step, max_steps)
    with stopwatch("optimizer"):
        gradients, observed = train_module.optimizer.gradients(), observed_blocks(train_module)
        parts = [[gradients[name] for name in names if name in gradients] for names in observed.values()]
        norms = normalize_and_clip(list(gradients.values()), max(tokens, 1), config.optimizer.grad_clip, parts)
        norm, *of_blocks = norms.tolist()
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            train_module.optimizer.step(rates)
            observe_step(train_module, {block: value**2 for block, value in zip(observed, of_blocks)})
        else:
            train_module.optimizer.drop_gradients()
    return StepResult(loss_sum / max(tokens, 1), norm, int(tokens), rates["blocks"], stops > 0, skipped=not finite)


def step_in_backward(
    train_module: TrainModule,
    micro_batches: list[MicroBatch],
    step: int,
    max_steps: int,
    stop_requested: bool,
    stopwatch: PhaseTimer,
) -> StepResult:
    """Make an optimizer step whose gradients die as soon as they are used. Collective: every rank.

    The parameters change before the loss is known to be finite: the result says ``skipped`` where it is not, but
    nothing is left out. The norm is that of unclipped gradients.
    """
    assert len(micro_batches) == 1, "gradients that are used at once can't be accumulated"
    tokens, stops = train_module.dims.all_reduce_sum([float(label_tokens(micro_batches[0])), float(stop_requested)])
    rates = learning_rates(train_module.config.scheduler, train_module.config.optimizer, step, max_steps)
    with train_module.optimizer.stepping_in_backward(rates, max(tokens, 1)) as made:
        local_loss, _ = accumulate_gradients(train_module, micro_batches, stopwatch)
    with stopwatch("optimizer"):
        observed, squares = observed_blocks(train_module), made.squares
        sums = [
            float(sum(squares[name] for name in names if name in squares)) for names in (squares, *observed.values())
        ]
        loss_sum, *reduced = train_module.dims.all_reduce_sum([local_loss, *sums])
    square_sum, *of_blocks = (value / train_module.dims.replicate for value in reduced)  # replicas hold the same
    norm = math.sqrt(square_sum)
    finite = math.isfinite(loss_sum) and math.isfinite(norm)
    if finite:
        observe_step(train_module, dict(zip(observed, of_blocks)))
    return StepResult(loss_sum / max(tokens, 1), norm, int(tokens), rates["blocks"], stops > 0, skipped=not finite)


def dry_run_batch(train_module: TrainModule, micro_batch: MicroBatch) -> dict[str, int]:
    """Run the longest micro-batch once, so that a run that does not fit fails in its first minute.

    Nothing is updated. Collective: every rank.

    Returns:
        This rank's persistent bytes by kind, counted while gradients are there.
    """
    accumulate_gradients(train_module, [micro_batch])
    counted = count_persistent_bytes(train_module)
    train_module.optimizer.drop_gradients()
    return counted


def train(config: Config) -> int:
    """Train in this rank and return its exit code. Collective: every rank.

    Raises:
        UserError: the configuration does not fit the model, the data or the ranks.
    """
    distributed.initialize(config.parallel)
    dims = ParallelDims.of(config.parallel)
    check_accumulation(config, dims.data_ranks)
    config = open_run_directory(config)
    setup_logging(config.run.dir)
    try:
        with explaining_out_of_memory(config, lambda: PREPARATION):
            run = prepare_run(config, dims)
    except UserError:
        forget_start(config)
        raise
    for sentence in options_without_effect(config, dims.data_ranks, run.validation is not None):
        if distributed.is_main():
            logger.warning(sentence)
    with run.recorder as recorder, run.heartbeat:
        try:
            with explaining_out_of_memory(config, run.heartbeat.place):
                stopped = train_steps(run)
        except BaseException as error:
            failure = run.heartbeat.explained(error)
            recorder.write_summary(f"failed: {type(failure).__name__}: {failure}")
            raise failure from (error if failure is not error else error.__cause__)
        recorder.write_summary("signal" if stopped else "finished")
    if stopped:
        distributed.barrier()
        ignore_stop_signals()
    return EXIT_STOPPED if stopped else EXIT_DONE


def train_steps(run: Run) -> bool:
    """Train to the end, or until a rank is asked to stop; return whether it was. Collective: every rank."""
    config, train_module, progress, heartbeat = run.config, run.train_module, run.progress, run.heartbeat
    first_step = progress.step
    if first_step == 0:
        evaluate(run)
        show_answers(run, "answers before training")
        if config.train.spike_factor > 0:
            save(run)  # what a first spike goes back to
    for step, micro_batches, data_seconds in coming_steps(run):
        heartbeat.begin_step(step + 1)
        figures = {"data_seconds": data_seconds}
        if step % train_module.period_length == 0:
            with heartbeat.phase("the draw and switch of active blocks"):
                figures["switch_seconds"] = switch(run, step)
        if step == first_step:
            with heartbeat.phase("the dry run of the longest micro-batch"):
                log_first_period(run)
        stop = stop_requested() or run.checkpoints.must_stop()
        run.recorder.begin_step()
        started = now()
        result = train_step(train_module, micro_batches, step, run.max_steps, stop, heartbeat.phase)
        figures["step_seconds"] = data_seconds + now() - started
        if is_spike(config.train, progress.recent_losses, result.loss):
            roll_back(run, step, result.loss)
            continue
        progress.step += 1
        progress.sequences += run.batches.global_batch_size
        record(run, result, figures)
        if result.skipped:
            skip_nonfinite_step(run, micro_batches, result.loss, result.grad_norm)
        last = progress.step == run.max_steps or result.stop_requested
        if progress.step == run.max_steps or is_due(config.train.eval_every, progress.step):
            evaluate(run)
        if last or is_due(config.checkpoint.every, progress.step):
            save(run)
        if result.stop_requested:
            break
    run.checkpoints.finish(stop_on_error=True)
    stopped = progress.step < run.max_steps
    if not stopped:
        show_answers(run, "answers after training")
    return stopped


def coming_steps(run: Run) -> Iterator[tuple[int, list[MicroBatch], float]]:
    """Yield each step to be made, this rank's micro-batches, and the seconds it waited for them.

    After a roll-back, from the checkpoint's step on.
    """
    progress = run.progress
    while progress.step < run.max_steps:
        first = progress.step
        batches = run.batches.iterate(progress.sequences, run.max_steps - first, progress.place_of)
        for step in range(first, run.max_steps):
            if step != progress.step:
                break
            started = now()
            micro_batches = next(batches)
            yield step, micro_batches, now() - started


def switch(run: Run, step: int) -> float:
    """Begin the period that starts with ``step``, and return the seconds it took. Collective: every rank."""
    started = now()
    train_module, period = run.train_module, step // run.train_module.period_length
    begin_period(train_module, period, run.coming_micro_batches)
    run.checkpoints.note_trained()
    run.recorder.record_period(period, step + 1, train_module.active.blocks, train_module.sampler.scores())
    return now() - started


def log_first_period(run: Run) -> None:
    """Try the longest micro-batch, and print and record what trains. Collective: every rank."""
    counted = dry_run_batch(run.train_module, run.batches.longest_micro_batch())
    announce_trained(run.train_module, counted)
    trained = count_trained_parameters(run.train_module)
    run.recorder.figures |= {"persistent_bytes": counted, "trained_parameters": trained}


def record(run: Run, result: StepResult, figures: dict[str, float]) -> None:
    """Record the step that was just made; ``figures`` are its times."""
    remember_loss(run.config.train, run.progress.recent_losses, result.loss)
    if not distributed.is_main():
        return
    lengths = run.batches.lengths(run.progress.sequences - run.batches.global_batch_size, run.progress.place_of)
    rate = peak_rate(distributed.device())
    if rate is not None:
        achieved = step_flops(run.train_module, lengths) / figures["step_seconds"]
        figures["mfu"] = achieved / (rate * run.train_module.dims.num_ranks)
    run.recorder.record_step(
        step=run.progress.step,
        epoch=run.batches.epoch(run.progress.sequences),
        period=run.train_module.active.period,
        active_layers=run.train_module.active.blocks,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens=int(lengths.sum()),
        label_tokens=result.tokens,
        **figures,
    )


def save(run: Run) -> None:
    """Write a checkpoint of this step. Collective: every rank."""
    with run.heartbeat.phase("the checkpoint", may_take_long=True):
        run.checkpoints.save(run.progress)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens each ``every`` steps (0: never) happens after ``step`` steps."""
    return every > 0 and step % every == 0
