"""What a run says of its steps: what trains in the first, and the rows of the others."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

import torch

from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.config.placement import stay_whole
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.batches import MicroBatch
from lisa_dist.method.module import TrainModule, count_trained_parameters
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.runtime import distributed
from lisa_dist.runtime.host_copy import HostCopy
from lisa_dist.runtime.units import format_bytes, format_count
from lisa_dist.sharding.rounding import dtype_of
from lisa_dist.telemetry.history import comparable, course_of, read_rows
from lisa_dist.telemetry.memory import free_memory_bytes, memory_kind, peak_memory_gib
from lisa_dist.telemetry.progress import announce
from lisa_dist.training.flops import peak_rate, step_flops
from lisa_dist.training.setup import Run


@dataclass
class StepResult:
    """What one optimizer step found, equal on every rank. What its device measured is waited for when it is read."""

    measured: HostCopy  # the sum of the losses, the gradient norm before clipping, those of observed blocks
    divisor: float  # what the objective divides the sum of the losses by
    label_tokens: int  # of the global batch
    lr: float
    stop_requested: bool  # a rank was asked to stop
    link_bytes: int = 0  # of weights that came from host memory

    @property
    def loss(self) -> float:
        """Of the global batch."""
        return self.measured.read()[0] / self.divisor

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self.measured.read()[1]

    @property
    def block_norms(self) -> list[float]:
        """The same of each block that the sampler learns from."""
        return self.measured.read()[2:]

    @property
    def skipped(self) -> bool:
        """Whether the loss or the gradient is not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


@dataclass
class MadeStep:
    """A step that is made and counted, whose numbers may still be unread."""

    result: StepResult
    micro_batches: list[MicroBatch]  # this rank's
    step: int  # counted from 1
    sequences: int  # that the run has seen, those of the step included
    has_row: bool  # whatever its numbers are


def count_step(run: Run, result: StepResult, seconds: dict[str, float]) -> None:
    """Count the step that was just made for the next row.

    Args:
        run: after that step.
        result: of the step; what was measured is not read.
        seconds: its times by name, see :meth:`Recorder.count_step`.
    """
    if not distributed.is_main():
        return
    batches, progress = run.batches, run.progress
    lengths = batches.lengths(progress.sequences - batches.global_batch_size, progress.place_of)
    flops = None if peak_rate(distributed.device()) is None else step_flops(run.train_module, lengths)
    if result.link_bytes:
        run.recorder.summary["link_bytes_per_step"] = result.link_bytes
        run.recorder.summary["link_misses"] = run.train_module.store.link_misses
    run.recorder.count_step(
        part_seconds=run.heartbeat.take_seconds(),  # now: when the row is written the next step may have made its own
        tokens=int(lengths.sum()),
        label_tokens=result.label_tokens,
        flops=flops,
        **seconds,
    )


def write_row(run: Run, made: MadeStep) -> None:
    """Write the row of the step that was counted last, and of those since the row before. No switch came since."""
    if not distributed.is_main():
        return
    train_module, result = run.train_module, made.result
    rate = peak_rate(distributed.device())
    run.recorder.record_step(
        step=made.step,
        epoch=run.batches.epoch(made.sequences),
        period=train_module.active.period,
        active_layers=train_module.active.blocks,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        peak_flops=None if rate is None else rate * train_module.dims.num_ranks,
    )


def law_bytes(train_module: TrainModule, trained: int) -> dict[str, Any]:
    """Return what the memory law says of a rank, for summary.json: ``law_bytes`` and ``law``.

    A frozen parameter costs what it is stored in; one that trains its exact value, its gradient, the optimizer's
    moments and, where it lies whole, the copy that the model computes with (embeddings have none, so they take less).
    Nothing where the law does not speak of this: quantised weights, masters over all replicas, moments of projections.
    """
    config, shards = train_module.config, train_module.dims.shard
    projects = config.update.trains_whole_blocks and not config.update.is_plain
    if config.model.quantization != "none" or config.parallel.optimizer_shard == "world" or projects:
        return {}
    stored, exact = dtype_of(config.precision.frozen), dtype_of(config.precision.active)
    copied = stored != exact and stay_whole(config.parallel, config.precision, shards)
    sample = torch.empty(2**20, dtype=exact, device="meta")
    moments = optimizer_spec(config.optimizer).state_bytes(sample) / sample.numel()
    active = 2 * exact.itemsize + moments + copied * stored.itemsize
    store = train_module.store
    frozen = sum(store.parameter(name).numel() for name in store.names) - trained
    text = f"{stored.itemsize} P_f + {active:.4g} P_a"
    return {
        "law_bytes": (stored.itemsize * frozen + active * trained) / shards,
        "law": text if shards == 1 else f"({text}) / {shards}",
    }


def last_lines(run: RunDirectory, stopped: bool) -> list[str]:
    """Return what a run says at its end: its losses and how they changed, its checkpoint, and what to do next."""
    rows, checkpoints = read_rows(run.metrics), list_checkpoints(run.checkpoints)
    step = next((row["step"] for row in reversed(rows) if "loss" in row), 0)
    lines = [f"{'stopped' if stopped else 'finished'} after step {step}"]
    for name, key in (("training loss", "loss"), ("validation loss", "eval_loss")):
        if course := course_of(comparable(rows, read_rows(run.events)), key):
            lines.append(f"{name:<16} {course}")
    named = shlex.quote(f"run.dir={run.path}")
    if checkpoints:
        lines.append(f"{'checkpoint':<16} {checkpoints[0]}")
    if stopped:
        lines.append(f"{'go on with':<16} lisa-dist train {named} checkpoint.resume=auto")
    else:
        lines.append(f"{'what it learned':<16} lisa-dist report {named}")
        lines.append(f"{'export it':<16} lisa-dist export {named} {shlex.quote(f'export.path={run.path}_hf')}")
    return lines


def announce_trained(train_module: TrainModule, counted: dict[str, int]) -> None:
    """Print what trains in the first period, what it holds and what is free, and the size of a checkpoint.

    Collective: every rank.

    Args:
        train_module: in its first period, the longest micro-batch just tried.
        counted: this rank's persistent bytes by kind.
    """
    parts = count_trained_parameters(train_module)
    # Masters that lie apart are written in place of the parameters, and no replica holds the same ones.
    apart = {"masters", "optimizer_state"} if "masters" in counted else set()
    own = sum(counted[kind] for kind in apart)
    held = sum(size for kind, size in counted.items() if kind not in ("gradients", *apart))
    held -= counted["active_parameters"] if apart else 0
    checkpoint = distributed.all_reduce_sum([own + held / train_module.dims.replicate])[0]
    free = free_memory_bytes()
    announce(
        {
            "trained parameters": f"{format_count(sum(parts.values()))}: "
            + ", ".join(f"{format_count(count)} in {part}" for part, count in parts.items() if count),
            "persistent bytes a rank": f"{format_bytes(sum(counted.values()))}: "
            + ", ".join(f"{format_bytes(size)} {kind.replace('_', ' ')}" for kind, size in counted.items()),
            "memory": f"{peak_memory_gib():.2f} GiB at the peak of the longest micro-batch ({memory_kind()})"
            + ("" if free is None else f", {format_bytes(free)} free"),
            "a checkpoint": format_bytes(checkpoint),
        }
    )
