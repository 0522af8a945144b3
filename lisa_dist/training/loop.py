"""The training loop.

At a period's first step switch the active blocks; then accumulate micro-batches, clip, step, record;
checkpoint on schedule or on a signal.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from time import perf_counter

from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, Config, UserError
from lisa_dist.config.checks import check_accumulation
from lisa_dist.method.module import begin_period, count_trained_parameters, trained_norms
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now
from lisa_dist.runtime.garbage import garbage_collected_when_asked
from lisa_dist.runtime.signals import ignore_stop_signals, stop_requested
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.telemetry.out_of_memory import PREPARATION, explaining_out_of_memory
from lisa_dist.training.evaluation import (
    ends_early,
    evaluate,
    is_best_to_keep,
    may_save_after_evaluation,
    note_best,
    show_answers,
    tell_of_best,
)
from lisa_dist.training.record import MadeStep, announce_trained, count_step, last_lines, law_bytes, write_row
from lisa_dist.training.recovery import is_spike, remember_loss, roll_back, skip_nonfinite_step
from lisa_dist.training.setup import Run, forget_start, open_run_directory, prepare_run
from lisa_dist.training.step import dry_run_batch, train_step

COLLECT_EVERY = 50  # steps


def train(config: Config) -> int:
    """Train in this rank and return its exit code. Collective: every rank.

    Raises:
        UserError: the configuration does not fit the model, the data or the ranks.
    """
    distributed.initialize(config.parallel)
    dims = ParallelDims.of(config.parallel)
    check_accumulation(config, dims.data_ranks)
    with ExitStack() as start:
        return train_in(open_run_directory(config, start), dims)


def train_in(config: Config, dims: ParallelDims) -> int:
    """Train in ``run.dir``, which is this start's own, and return the exit code. Collective: every rank."""
    setup_logging(config.run.dir)
    try:
        with explaining_out_of_memory(config, lambda: PREPARATION):
            run = prepare_run(config, dims)
    except UserError:
        forget_start(config)
        raise
    with run.recorder as recorder, run.heartbeat:
        try:
            with explaining_out_of_memory(config, run.heartbeat.place), garbage_collected_when_asked():
                stopped = train_steps(run)
            recorder.summary["weight_norms"] = trained_norms(run.train_module)
            note_best(run)
            recorder.write_summary("signal" if stopped else "finished")
        except BaseException as error:
            failure = run.heartbeat.explained(error)
            note_best(run)
            with suppress(OSError):  # a full disk has no room for it, and the failure is told
                recorder.write_summary(f"failed: {type(failure).__name__}: {failure}")
            raise failure from (error if failure is not error else error.__cause__)
    if distributed.is_main():
        print("\n".join(last_lines(run.recorder.run, stopped)), flush=True)
    if stopped:
        distributed.barrier()
        ignore_stop_signals()
    return EXIT_STOPPED if stopped else EXIT_DONE


def train_steps(run: Run) -> bool:
    """Train to the end, or until a rank is asked to stop; return whether it was. Collective: every rank."""
    config, first_step = run.config, run.progress.step
    with ExitStack() as start_up:
        start_up.enter_context(distributed.longer_timeout(config.parallel.timeout, run.train_module.dims.mesh))
        if first_step == 0:
            evaluate(run)
            show_answers(run, "answers before training")
            if config.train.spike_factor > 0:
                save_checkpoint(run)  # what a first spike goes back to
        while not ends_early(run) and (loss := train_until_spike(run, first_step, start_up)) is not None:
            roll_back(run, loss)
    run.checkpoints.finish(stop_on_error=True)
    stopped = run.progress.step < run.max_steps and not ends_early(run)
    if not stopped:
        tell_of_best(run)
        show_answers(run, "answers after training")
    return stopped


def train_until_spike(run: Run, first_step: int, start_up: ExitStack) -> float | None:
    """Train until the last step, an early end, a stop, or a loss that spikes, which is returned. Collective: all ranks.

    Goes on from ``run.progress``, which a step that spiked leaves as it was. ``first_step`` is that of this start,
    before which the longest micro-batch is tried and with which ``start_up`` ends.
    """
    config, progress, heartbeat = run.config, run.progress, run.heartbeat
    global_batches = run.batches.iterate(progress.sequences, run.max_steps - progress.step, progress.place_of)
    unread: MadeStep | None = None  # the last one, where its device may still be at work
    with closing(global_batches):
        for step in range(progress.step, run.max_steps):
            seconds = begin_step(run, step, first_step)
            started = perf_counter()
            with heartbeat.phase("the wait for data"):
                micro_batches = next(global_batches)
            seconds["data_seconds"] = perf_counter() - started
            stop = stop_requested() or run.checkpoints.must_stop()
            result = train_step(run.train_module, micro_batches, step, run.max_steps, stop, heartbeat.phase)
            after = what_follows(run, step + 1, result.stop_requested, step == first_step)
            with heartbeat.phase("the wait for the device"):
                for waited_for in ([] if unread is None else [unread.result]) + ([result] if after.reads else []):
                    waited_for.measured.read()
            seconds["step_seconds"] = perf_counter() - started
            start_up.close()  # no later step compiles, connects and allocates as the first does
            if unread is not None:
                finish_step(run, unread)
            if config.train.spike_factor > 0:
                if is_spike(config.train, progress.recent_losses, result.loss):
                    return result.loss
                remember_loss(config.train, progress.recent_losses, result.loss)
            progress.step += 1
            progress.sequences += run.batches.global_batch_size
            count_step(run, result, seconds)
            unread = MadeStep(result, micro_batches, progress.step, progress.sequences, after.has_row)
            if after.reads:
                finish_step(run, unread)
                unread = None
            if after.evaluates:
                evaluate(run)
            if after.samples and not ends_early(run):
                show_answers(run, f"answers after step {progress.step}")
            stops = result.stop_requested or ends_early(run)
            if after.saves or (after.evaluates and (stops or is_best_to_keep(run))):
                save_checkpoint(run, is_last=stops or progress.step == run.max_steps)
            if stops:
                break
    return None


@dataclass(frozen=True)
class Following:
    """What comes after a step; ``reads``: the step's loss and norm are waited for before the next one is begun."""

    evaluates: bool
    samples: bool
    saves: bool
    reads: bool
    has_row: bool


def what_follows(run: Run, step: int, stops: bool, is_first: bool) -> Following:
    """Return what comes after ``step`` steps by the schedules; an evaluation may have the run saved too."""
    train, ends = run.config.train, step == run.max_steps
    evaluates = ends or is_due(train.eval_every, step)
    samples = not ends and is_due(train.sample_every, step)
    saves = ends or stops or is_due(run.config.checkpoint.every, step)
    # A step is read once the device has the next one to go on with, but before whatever else comes after it.
    switches = is_due(run.train_module.period_length, step)
    reads = evaluates or samples or saves or switches or is_first or train.spike_factor > 0
    # Whatever is saved has a row: a resume finds in the rows what was counted until then.
    has_row = saves or is_due(train.log_every, step) or (evaluates and may_save_after_evaluation(run.config))
    return Following(evaluates, samples, saves, reads, has_row)


def begin_step(run: Run, step: int, first_step: int) -> dict[str, float]:
    """Do what comes before a step: the switch, and the dry run before the first. Collective: every rank.

    Returns:
        ``switch_seconds``, where there was one.
    """
    run.heartbeat.begin_step(step + 1, may_take_long=step == first_step)
    seconds = {}
    if step % run.train_module.period_length == 0:
        with run.heartbeat.phase("the draw and switch of active blocks"):
            seconds["switch_seconds"] = switch(run, step)
    if step == first_step:
        compiles = run.train_module.kernels == "compile"
        with run.heartbeat.phase("the compilation of blocks" if compiles else "the dry run of the longest micro-batch"):
            log_first_period(run)
    if is_due(COLLECT_EVERY, step):
        gc.collect()
    run.recorder.begin_step()
    return seconds


def finish_step(run: Run, made: MadeStep) -> None:
    """Write the row of a step, where it has one, and do what is to be done where it was left out."""
    if made.has_row or made.result.skipped:
        write_row(run, made)
    if made.result.skipped:
        skip_nonfinite_step(run, made)


def switch(run: Run, step: int) -> float:
    """Begin the period that starts with ``step``, and return the seconds it took. Collective: every rank."""
    started = now()
    train_module, period = run.train_module, step // run.train_module.period_length
    norms = trained_norms(train_module)  # of the blocks that leave, before they are rounded
    begin_period(train_module, period, run.coming_micro_batches)
    norms |= trained_norms(train_module)
    run.checkpoints.note_trained()
    active, scores = train_module.active, train_module.sampler.scores()
    modules = active.modules if run.config.sampler.draws_non_block_modules else None
    run.recorder.record_period(period, step + 1, active.blocks, norms, scores, modules)
    return now() - started


def log_first_period(run: Run) -> None:
    """Try the longest micro-batch, and print and record what trains. Collective: every rank."""
    counted = dry_run_batch(run.train_module, run.batches.longest_micro_batch())
    announce_trained(run.train_module, counted)
    trained = count_trained_parameters(run.train_module)
    known = {"persistent_bytes": counted, "trained_parameters": trained}
    run.recorder.summary |= known | law_bytes(run.train_module, sum(trained.values()))


def save_checkpoint(run: Run, is_last: bool = False) -> None:
    """Write a checkpoint of this step, ``is_last``: of this start. Collective: every rank."""
    with run.heartbeat.phase("the checkpoint", may_take_long=True):
        run.checkpoints.save(run.progress, is_last)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens each ``every`` steps (0: never) happens after ``step`` steps."""
    return every > 0 and step % every == 0
