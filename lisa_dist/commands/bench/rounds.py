"""Rounds of measured steps: targets take turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lisa_dist.commands.bench.steps import PARTS, Step, StepClock
from lisa_dist.commands.bench.stopwatch import PeakMemory, spread_of
from lisa_dist.commands.bench.targets import BenchTarget
from lisa_dist.config import Config
from lisa_dist.data.batches import GlobalBatches
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now
from lisa_dist.training.flops import peak_rate

logger = logging.getLogger(__name__)

Builder = Callable[[Config, GlobalBatches], BenchTarget]


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
    clock: StepClock
    peak_bytes: int = 0
    rounds: list[Round] = field(default_factory=list)


def enter(name: str, config: Config, build: Builder, batches: GlobalBatches) -> BenchRun:
    """Build a target, warm it up over a switch, and note the most memory it took. Collective: every rank."""
    logger.info("%s: warming up", name)
    with PeakMemory(distributed.device()) as peak:
        target = build(config, batches)
        peak.start()
        bench_run = BenchRun(name, config, target, StepClock(batches))
        target.switch()
        target.dry_run_batch(batches.longest_micro_batch())
        measure_steps(bench_run, config.bench.warmup_steps)
        target.switch()
        measure_steps(bench_run, 1)
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
            first, *measured = measure_steps(bench_run, 1 + steps)
            bench_run.rounds.append(Round(switch_seconds, first, measured))
        logger.info("round %d of %d", turn + 1, rounds)


def measure_steps(bench_run: BenchRun, count: int) -> list[Step]:
    """Make steps and measure them. Collective: every rank."""
    bench_run.target.make_steps(bench_run.clock, count)
    return bench_run.clock.take()


def summarize(bench_run: BenchRun) -> dict[str, Any]:
    """Return what was measured of a target in numbers. Collective: every rank."""
    rounds, steps = bench_run.rounds, [step for round_ in bench_run.rounds for step in round_.steps]
    seconds = spread_of([step.seconds for step in steps])
    switch = spread_of([round_.switch_seconds + round_.first.seconds - round_.median() for round_ in rounds])
    timed = {part for step in steps for part in step.parts}
    parts = {part: statistics.median(step.parts.get(part, 0.0) for step in steps) for part in PARTS if part in timed}
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
