"""Rounds of measured steps: targets take turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lisa_dist.commands.bench.stopwatch import PeakMemory, Stopwatch, spread_of
from lisa_dist.commands.bench.targets import HORIZON, BenchTarget
from lisa_dist.config import Config
from lisa_dist.data.batches import GlobalBatches, MicroBatch, label_tokens
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now
from lisa_dist.training.flops import peak_rate

logger = logging.getLogger(__name__)

Builder = Callable[[Config, GlobalBatches], BenchTarget]

PARTS = ("data", "forward", "backward", "optimizer", "other", "switch")


@dataclass
class Step:
    """One measured optimizer step: seconds by this rank's clock, the rest of all ranks."""

    seconds: float
    cpu_seconds: float  # that all threads of this rank spent on a processor: what other programs do, does not count
    parts: dict[str, float]
    tokens: int  # padding left out
    label_tokens: int
    flops: float


@dataclass
class Round:
    """A switch, the step after it, which bears its after-effects, and the steps that are measured."""

    switch_seconds: float
    first: Step
    steps: list[Step]

    def median(self, name: str = "seconds") -> float:
        """Return the median of a field of the measured steps."""
        return statistics.median(getattr(step, name) for step in self.steps)


@dataclass
class BenchRun:
    """A target with its data and what was measured of it."""

    name: str
    config: Config
    target: BenchTarget
    data: GlobalBatches
    batches: Iterator[list[MicroBatch]]
    peak_bytes: int = 0
    seen: int = 0  # sequences
    rounds: list[Round] = field(default_factory=list)


def enter(name: str, config: Config, build: Builder, batches: GlobalBatches) -> BenchRun:
    """Build a target, warm it up over a switch, and note the most memory it took. Collective: every rank."""
    logger.info("%s: warming up", name)
    with PeakMemory(distributed.device()) as peak:
        target = build(config, batches)
        peak.start()
        bench_run = BenchRun(name, config, target, batches, batches.iterate(0, HORIZON))
        target.switch()
        target.dry_run_batch(batches.longest_micro_batch())
        for _ in range(config.bench.warmup_steps):
            measure_step(bench_run)
        target.switch()
        measure_step(bench_run)
    bench_run.peak_bytes = peak.bytes
    return bench_run


def interleave(bench_runs: list[BenchRun], rounds: int, steps: int) -> None:
    """Measure round by round, each time in the opposite order, so that noise hits all alike. Collective: every rank."""
    for turn in range(rounds):
        for bench_run in bench_runs if turn % 2 == 0 else reversed(bench_runs):
            distributed.barrier()
            started = now()
            bench_run.target.switch()
            switch_seconds = now() - started
            first = measure_step(bench_run)
            bench_run.rounds.append(Round(switch_seconds, first, [measure_step(bench_run) for _ in range(steps)]))
        logger.info("round %d of %d", turn + 1, rounds)


def measure_step(bench_run: BenchRun) -> Step:
    """Make one step and measure it. Collective: every rank."""
    stopwatch = Stopwatch(distributed.device())
    started, cpu_started = now(), time.process_time()
    with stopwatch("data"):
        micro_batches = next(bench_run.batches)
    bench_run.target.step(micro_batches, stopwatch)
    seconds, cpu_seconds = now() - started, time.process_time() - cpu_started
    parts = {part: spent for part, spent in stopwatch.take().items() if part in PARTS}
    parts["other"] = seconds - sum(parts.values())
    lengths = bench_run.data.lengths(bench_run.seen)
    bench_run.seen += bench_run.data.global_batch_size
    (labels,) = distributed.all_reduce_sum([float(sum(map(label_tokens, micro_batches)))])
    return Step(seconds, cpu_seconds, parts, int(lengths.sum()), int(labels), bench_run.target.flops(lengths) or 0.0)


def summarize(bench_run: BenchRun) -> dict[str, Any]:
    """Return what was measured of a target in numbers. Collective: every rank."""
    rounds, steps = bench_run.rounds, [step for round_ in bench_run.rounds for step in round_.steps]
    seconds = spread_of([step.seconds for step in steps])
    switch = spread_of([round_.switch_seconds + round_.first.seconds - round_.median() for round_ in rounds])
    parts = {part: statistics.median(step.parts.get(part, 0.0) for step in steps) for part in PARTS}
    parts["switch"] = switch["median"] / bench_run.config.sampler.period
    slowdown = 1 + parts["switch"] / seconds["median"]

    def rate(name: str) -> float:
        return statistics.median(getattr(step, name) / step.seconds for step in steps) / slowdown

    flops_rate, peak = rate("flops"), peak_rate(distributed.device())
    peaks = distributed.gather_objects(bench_run.peak_bytes)
    return {
        "method": bench_run.name,
        "tokens_per_second": rate("tokens"),
        "label_tokens_per_second": rate("label_tokens"),
        "step_seconds": {**seconds, "by_part": parts},
        "cpu_seconds": spread_of([step.cpu_seconds for step in steps]),
        "switch_seconds": switch,
        "switch_in_steps": switch["median"] / seconds["median"],
        "peak_bytes": max(peaks),
        "peak_bytes_by_rank": peaks,
        "flops_per_second": flops_rate or None,
        "utilisation": flops_rate / (peak * distributed.world_size()) if peak is not None and flops_rate else None,
        "measured_steps": len(steps),
    }


def ratio(bench_run: BenchRun, reference: BenchRun) -> dict[str, Any]:
    """Return the step time relative to the reference's: a ratio each round, their median and quartile distance.

    ``cpu`` is the same of processor seconds, which other programs on the machine disturb far less.
    """
    pairs = list(zip(bench_run.rounds, reference.rounds))
    seconds, cpu = (
        spread_of([own.median(name) / other.median(name) for own, other in pairs])
        for name in ("seconds", "cpu_seconds")
    )
    return {**seconds, "cpu": cpu}
