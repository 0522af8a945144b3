"""What the loop does about a step that went wrong: a loss that is not finite, or one that spikes.

Every rank decides the same, because losses and norms are the same on every rank.
"""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path

from lisa_dist.checkpoint.restore import newest_complete, restore_checkpoint
from lisa_dist.checkpoint.shards import write_safetensors
from lisa_dist.config import TrainConfig
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import to_json, write_atomically
from lisa_dist.training.record import MadeStep
from lisa_dist.training.setup import Run

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite; that step has changed no parameter, but with ``optimizer.in_backward``."""


class LossSpikeError(RuntimeError):
    """The loss spiked again after as many roll-backs as are allowed."""


def skip_nonfinite_step(run: Run, made: MadeStep) -> None:
    """Count a step as left out and keep its batch for inspection.

    Raises:
        NonFiniteError: with ``train.on_nonfinite=stop``, or at the limit of steps left out.
    """
    config, progress = run.config.train, run.progress
    progress.skipped_steps += 1
    run.recorder.summary["skipped_steps"] = progress.skipped_steps
    kept = keep_batch(run, made)
    loss, grad_norm = made.result.loss, made.result.grad_norm
    found = f"step {made.step}: loss {loss} and gradient norm {grad_norm} are not both finite"
    if config.on_nonfinite == "stop":
        raise NonFiniteError(f"{found}; the batch is in {kept}, train.on_nonfinite=skip leaves such steps out")
    if progress.skipped_steps > config.nonfinite_limit:
        raise NonFiniteError(
            f"{found}, and {config.nonfinite_limit} steps were left out before (train.nonfinite_limit); "
            f"the batch is in {kept}"
        )
    run.recorder.record_event(made.step, "fault", f"{found}: the step is left out")
    if distributed.is_main():
        logger.warning("%s: the step is left out, the %dth; its batch is in %s", found, progress.skipped_steps, kept)


def keep_batch(run: Run, made: MadeStep) -> Path:
    """Write this rank's micro-batches, and on rank 0 what is known of the step, below ``run.dir/faults``."""
    folder = RunDirectory.of(run.config).faults / f"step_{made.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{index}.{name}": t for index, batch in enumerate(made.micro_batches) for name, t in batch.items()}
    write_safetensors(tensors, folder / f"rank_{distributed.rank():05d}.safetensors", {})
    if distributed.is_main():
        seen = made.sequences - run.batches.global_batch_size
        facts = {
            "step": made.step,
            "loss": str(made.result.loss),  # JSON has no word for inf
            "grad_norm": str(made.result.grad_norm),
            "active_layers": run.train_module.active.blocks,
            "sequences": run.batches.micro_batch_indices(seen, run.progress.place_of),  # i mod ranks: whose
        }
        write_atomically(folder / "step.json", to_json(facts, indent=1))
    return folder


def is_spike(config: TrainConfig, recent: list[float], loss: float) -> bool:
    """Whether ``loss`` is more than ``train.spike_factor`` times the median of the last ``spike_window`` losses."""
    if config.spike_factor == 0 or len(recent) < config.spike_window or not math.isfinite(loss):
        return False
    return loss > config.spike_factor * statistics.median(recent)


def remember_loss(config: TrainConfig, recent: list[float], loss: float) -> None:
    """Add a loss to those that spikes are measured by."""
    if config.spike_factor > 0 and math.isfinite(loss):
        recent.append(loss)
        del recent[: -config.spike_window]


def roll_back(run: Run, loss: float) -> None:
    """Go back to the newest checkpoint, and leave out the sequences of the step that led to ``loss`` from then on.

    Collective: every rank, before ``run.progress`` counts that step.

    Raises:
        LossSpikeError: at the limit of roll-backs.
    """
    config, progress = run.config.train, run.progress
    last = progress.sequences + run.batches.global_batch_size - 1
    stretch = [progress.place_of(progress.sequences), progress.place_of(last) + 1]
    times = loss / statistics.median(progress.recent_losses)
    found = f"step {progress.step + 1}: loss {loss:.4f} is {times:.1f} times the median"
    if len(progress.left_out) >= config.spike_limit:
        raise LossSpikeError(f"{found}, after {config.spike_limit} roll-backs (train.spike_limit)")
    run.checkpoints.finish()
    newest = newest_complete(run.checkpoints.directory)
    assert newest is not None, "a run that measures spikes begins with a checkpoint"
    train_module = run.train_module
    restored, state = restore_checkpoint(train_module, newest, distributed.device(), progress.data)
    run.checkpoints.continue_from(newest, state)
    restored.forget_best_of_others(progress.evaluated)
    progress.step, progress.sequences = restored.step, restored.sequences
    progress.recent_losses = restored.recent_losses
    progress.best_eval_loss, progress.best_step = restored.best_eval_loss, restored.best_step
    progress.evaluations_since_best = restored.evaluations_since_best
    progress.evaluated_since = run.recorder.evaluated_since = restored.evaluated_since
    progress.left_out.append(stretch)
    run.recorder.cut_after(progress.step)
    run.heartbeat.take_seconds()  # of the steps that are dropped
    run.recorder.record_event(progress.step, "roll-back", f"{found}: back to step {progress.step}")
    if distributed.is_main():
        logger.warning(
            "%s: back to step %d, without sequences %d to %d", found, progress.step, stretch[0], stretch[1] - 1
        )
