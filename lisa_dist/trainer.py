"""The training loop.

At a period's first step switch the active blocks; then accumulate micro-batches, clip, step, record;
checkpoint on schedule or on a signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule

from lisa_dist import distributed
from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, Config
from lisa_dist.data.batches import MicroBatch, label_tokens
from lisa_dist.learner import Learner, begin_period, count_persistent_bytes, count_trained_parameters
from lisa_dist.optim.clipping import normalize_and_clip
from lisa_dist.optim.schedule import learning_rate
from lisa_dist.preparation import Run, announce_trained, open_run_directory, prepare_run
from lisa_dist.sample_answers import show_answers
from lisa_dist.signals import ignore_stop_signals, stop_requested
from lisa_dist.telemetry.logs import setup_logging

Stopwatch = Callable[[str], AbstractContextManager[None]]  # names the part of a step that its body is


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite."""


@dataclass
class StepResult:
    """What one optimizer step found, equal on every rank."""

    loss: float  # mean over the label tokens of the global batch
    grad_norm: float  # before clipping
    tokens: int  # label tokens of the global batch
    lr: float
    stop_requested: bool  # a rank was asked to stop
    skipped: bool = False  # the loss or the gradient was not finite


def no_stopwatch(part: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()


def accumulate_gradients(
    learner: Learner, micro_batches: list[MicroBatch], stopwatch: Stopwatch = no_stopwatch
) -> tuple[float, int]:
    """Add up the gradients of a global batch. Collective: every rank, with equally many micro-batches.

    Returns:
        This rank's loss, summed over its label tokens, and their number.
    """
    module = learner.sharded.module
    loss_sum = torch.zeros((), device=next(module.parameters()).device)
    tokens = 0
    for index, micro_batch in enumerate(micro_batches):
        assert isinstance(module, FSDPModule)
        if learner.config.parallel.defer_reduction:
            module.set_requires_gradient_sync(index == len(micro_batches) - 1)
        tokens += label_tokens(micro_batch)
        inputs = {key: tensor.to(loss_sum.device, non_blocking=True) for key, tensor in micro_batch.items()}
        with stopwatch("forward"):
            loss = module(**inputs)
        with stopwatch("backward"):
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum.item(), tokens


def train_step(
    learner: Learner,
    micro_batches: list[MicroBatch],
    step: int,
    max_steps: int,
    stop_requested: bool = False,
    stopwatch: Stopwatch = no_stopwatch,
) -> StepResult:
    """Make optimizer step ``step`` (counted from 0). Collective: every rank.

    Raises:
        NonFiniteError: with ``train.on_nonfinite=stop``; parameters are as they were before the step.
    """
    config = learner.config
    # Dropout depends on the step and the rank alone, so a resumed run draws the same.
    torch.manual_seed(hash((config.train.seed, step, distributed.rank())) % 2**63)
    local_loss, local_tokens = accumulate_gradients(learner, micro_batches, stopwatch)
    loss_sum, tokens, stops = distributed.all_reduce_sum([local_loss, local_tokens, float(stop_requested)])
    lr = learning_rate(config.scheduler, config.optimizer.lr, step, max_steps)
    with stopwatch("optimizer"):
        parameters = learner.optimizer.parameters.values()
        norm = normalize_and_clip(parameters, max(tokens, 1), config.optimizer.grad_clip).item()
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            learner.optimizer.step(lr)
        else:
            learner.optimizer.drop_gradients()
    result = StepResult(loss_sum / max(tokens, 1), norm, int(tokens), lr, stops > 0, skipped=not finite)
    if not finite and config.train.on_nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: loss {result.loss} and gradient norm {norm} are not both finite; "
            "train.on_nonfinite=skip would leave such steps out"
        )
    return result


@torch.no_grad()
def mean_loss(learner: Learner, micro_batches: Iterable[MicroBatch]) -> float:
    """Return the mean loss over all label tokens of all ranks. Collective: every rank, equally many micro-batches."""
    module = learner.sharded.module
    module.eval()
    device = next(module.parameters()).device
    loss_sum, tokens = torch.zeros((), device=device), 0
    for micro_batch in micro_batches:
        tokens += label_tokens(micro_batch)
        loss_sum += module(**{key: tensor.to(device) for key, tensor in micro_batch.items()})
    module.train()
    total, counted = distributed.all_reduce_sum([loss_sum.item(), float(tokens)])
    return total / max(counted, 1)


def rehearse(learner: Learner, micro_batch: MicroBatch) -> dict[str, int]:
    """Run the longest micro-batch once, so that a run that does not fit fails in its first minute.

    Nothing is updated. Collective: every rank.

    Returns:
        This rank's persistent bytes by kind, counted while gradients are there.
    """
    accumulate_gradients(learner, [micro_batch])
    counted = count_persistent_bytes(learner)
    learner.optimizer.drop_gradients()
    return counted


def train(config: Config) -> int:
    """Train in this rank and return its exit code. Collective: every rank.

    Raises:
        UserError: the configuration does not fit the model, the data or the ranks.
    """
    distributed.initialize(config.parallel)
    config = open_run_directory(config)
    setup_logging(config.run.dir)
    run = prepare_run(config)
    with run.recorder as recorder:
        try:
            stopped = train_steps(run)
        except BaseException as error:
            recorder.write_summary(f"failed: {type(error).__name__}: {error}")
            raise
        recorder.write_summary("signal" if stopped else "finished")
    if stopped:
        distributed.barrier()
        ignore_stop_signals()
    return EXIT_STOPPED if stopped else EXIT_DONE


def train_steps(run: Run) -> bool:
    """Train to the end, or until a rank is asked to stop; return whether it was. Collective: every rank."""
    config, learner, progress, recorder = run.config, run.learner, run.progress, run.recorder
    first_step = progress.step
    if first_step == 0:
        evaluate(run)
        show_answers(run, "answers before training")
    for step, micro_batches in enumerate(run.batches.iterate(first_step, run.max_steps), start=first_step):
        started = time.monotonic()
        if step % learner.period_length == 0:
            begin_period(learner, step // learner.period_length)
            run.checkpoints.note_trained()
            recorder.record_period(learner.active.period, step + 1, learner.active.blocks, learner.sampler.scores())
        if step == first_step:
            counted = rehearse(learner, run.batches.longest_micro_batch())
            announce_trained(learner, counted)
            recorder.figures |= {"persistent_bytes": counted, "trained_parameters": count_trained_parameters(learner)}
        result = train_step(learner, micro_batches, step, run.max_steps, stop_requested() or run.checkpoints.must_stop())
        progress.step += 1
        recorder.record_step(
            step=progress.step,
            epoch=run.batches.epoch(progress.step),
            period=learner.active.period,
            active_layers=learner.active.blocks,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            step_seconds=time.monotonic() - started,
        )
        last = progress.step == run.max_steps or result.stop_requested
        if last or is_due(config.train.eval_every, progress.step):
            evaluate(run)
        if last or is_due(config.checkpoint.every, progress.step):
            run.checkpoints.save(progress)
        if result.stop_requested:
            break
    run.checkpoints.finish(stop_on_error=True)
    stopped = progress.step < run.max_steps
    if not stopped:
        show_answers(run, "answers after training")
    return stopped


def is_due(every: int, step: int) -> bool:
    """Whether something that happens each ``every`` steps (0: never) happens after ``step`` steps."""
    return every > 0 and step % every == 0


def evaluate(run: Run) -> None:
    """Record the mean loss of the validation set, where there is one. Collective: every rank."""
    if run.validation is not None:
        batches = run.validation.validation_batches(run.config.train.eval_batches)
        run.recorder.record_evaluation(run.progress.step, mean_loss(run.learner, batches))
