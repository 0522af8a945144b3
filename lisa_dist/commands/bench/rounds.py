"""Rounds of measured steps: targets take turns, so that what else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lisa_dist.commands.bench.steps import PARTS, Step, StepClock
from lisa_dist.commands.bench.stopwatch import PeakMemory, spread_of
from lisa_dist.commands.bench.targets import BenchTarget
from lisa_dist.config import Config
from lisa_dist.data.batches import GlobalBatches
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import now
from lisa_dist.telemetry.memory import free_memory_bytes
from lisa_dist.training.flops import peak_rate

logger = logging.getLogger(__name__)

Builder = Callable[[Config, GlobalBatches], BenchTarget]

ROUNDS_ALONE = 3  # where each round builds its target anew


@dataclass
class Round:
    """A switch, the step after it, which bears its after-effects, and the steps that are measured."""

    draw: str  # of BenchRun.draws; empty: the sampler's own
    switch_seconds: float
    first: Step
    steps: list[Step]

    def median(self, name: str = "seconds") -> float:
        """Return the median of a field of the measured steps."""
        return statistics.median(getattr(step, name) for step in self.steps)


@dataclass
class BenchRun:
    """A target, how it is built, and what was measured of it."""

    name: str
    config: Config
    build: Builder
    batches: GlobalBatches
    draws: Mapping[str, list[int]] = field(default_factory=dict)  # which its rounds take in turn, by name
    target: BenchTarget | None = None  # while it is in memory
    clock: StepClock | None = None
    kernels: str = ""  # what model.kernels came to, or a target's own
    peak_bytes: int = 0
    rounds: list[Round] = field(default_factory=list)


def measure(bench_runs: list[BenchRun]) -> bool:
    """Measure round by round, each time in the opposite order, so that noise hits all alike. Collective: every rank.

    Where there is not room for all targets at a time, each is alone in memory, and is built and warmed up anew for each
    of fewer rounds.

    Returns:
        Whether they were in memory together.
    """
    together = enter_together(bench_runs)
    bench = bench_runs[0].config.bench
    rounds = bench.rounds if together else min(bench.rounds, ROUNDS_ALONE)
    shown = max(len(bench_run.draws) for bench_run in bench_runs) or 1
    rounds = math.ceil(rounds / shown) * shown
    for turn in range(rounds):
        for bench_run in bench_runs if turn % 2 == 0 else reversed(bench_runs):
            if bench_run.target is None:
                enter(bench_run)
            measure_round(bench_run, turn, math.ceil(bench.steps / rounds))
            if not together:
                leave(bench_run)
        logger.info("round %d of %d", turn + 1, rounds)
    return together


def enter_together(bench_runs: list[BenchRun]) -> bool:
    """Build and warm up all targets while there is room, or none of them. Collective: every rank.

    There is room where as much is free as the largest of them so far needed at its peak; a larger one that runs out of
    memory on a rank that has no others has none either.
    """
    ran_out = False
    for count, bench_run in enumerate(bench_runs):
        needed = max(other.peak_bytes for other in bench_runs)
        if count and not _has_room(needed):
            ran_out = True
            break
        try:
            enter(bench_run)
        except torch.OutOfMemoryError:
            if not count or not distributed.is_alone():
                raise
            ran_out = True  # what the error holds on to is freed once this clause is left
            break
    if ran_out:
        logger.info("no room for all at a time: each is alone in memory, built anew for each round")
        for bench_run in bench_runs:
            leave(bench_run)
    return not ran_out


def _has_room(needed: int) -> bool:
    """Whether every rank has so many bytes free. Collective: every rank."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    free = free_memory_bytes()
    return min(distributed.gather_objects(math.inf if free is None else free)) >= needed


def enter(bench_run: BenchRun) -> None:
    """Build a target, warm it up over a switch, and note the most memory it took. Collective: every rank."""
    logger.info("%s: warming up", bench_run.name)
    with PeakMemory(distributed.device()) as peak:
        target = bench_run.target = bench_run.build(bench_run.config, bench_run.batches)
        peak.start()
        bench_run.clock = StepClock(bench_run.batches)
        draws = list(bench_run.draws.values())
        target.switch(draws[0] if draws else None)
        target.dry_run_batch(bench_run.batches.longest_micro_batch())
        measure_steps(bench_run, bench_run.config.bench.warmup_steps)
        target.switch(draws[-1] if draws else None)
        measure_steps(bench_run, 1)
    bench_run.kernels = target.kernels
    bench_run.peak_bytes = max(bench_run.peak_bytes, peak.bytes)


def leave(bench_run: BenchRun) -> None:
    """Free a target's memory. No communication."""
    if bench_run.target is not None:
        for parameter in bench_run.target.model.parameters():
            # Hooks refer to what holds the parameter; autograd holds them where Python's collector does not look.
            if parameter._post_accumulate_grad_hooks:
                parameter._post_accumulate_grad_hooks.clear()
    bench_run.target = bench_run.clock = None
    gc.collect()  # modules, hooks and trainers refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_round(bench_run: BenchRun, turn: int, steps: int) -> None:
    """Measure a switch, the step after it, and ``steps`` more. Collective: every rank."""
    assert bench_run.target is not None
    draws = list(bench_run.draws)
    draw = draws[turn % len(draws)] if draws else ""
    distributed.barrier()
    started = now()
    bench_run.target.switch(bench_run.draws[draw] if draws else None)
    switch_seconds = now() - started
    first, *measured = measure_steps(bench_run, 1 + steps)
    bench_run.rounds.append(Round(draw, switch_seconds, first, measured))


def measure_steps(bench_run: BenchRun, count: int) -> list[Step]:
    """Make steps and measure them. Collective: every rank."""
    assert bench_run.target is not None and bench_run.clock is not None
    bench_run.target.make_steps(bench_run.clock, count)
    return bench_run.clock.take()


def over_draws(rounds: list[Round], values: Callable[[Round], list[float]]) -> dict[str, float]:
    """Return the median of the rounds' values by draw."""
    found: dict[str, list[float]] = {}
    for round_ in rounds:
        found.setdefault(round_.draw, []).extend(values(round_))
    return {draw: statistics.median(those) for draw, those in found.items()}


def summarize(bench_run: BenchRun, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Return what was measured of a target in numbers. Collective: every rank.

    Where the draw of blocks matters, a step's seconds, operations and tokens are the means over the draws' medians.
    """
    rounds, steps = bench_run.rounds, [step for round_ in bench_run.rounds for step in round_.steps]

    def mean(name: str) -> float:
        by_draw = over_draws(rounds, lambda round_: [getattr(step, name) for step in round_.steps])
        return statistics.mean(by_draw.values())

    seconds = {**spread_of([step.seconds for step in steps]), "median": mean("seconds")}
    switch = spread_of([round_.switch_seconds + round_.first.seconds - round_.median() for round_ in rounds])
    timed = {part for step in steps for part in step.parts}
    parts = {part: statistics.median(step.parts.get(part, 0.0) for step in steps) for part in PARTS if part in timed}
    parts["switch"] = switch["median"] / bench_run.config.sampler.period
    slowdown = 1 + parts["switch"] / seconds["median"]

    def rate(name: str) -> float:
        if bench_run.draws:
            return mean(name) / seconds["median"] / slowdown
        return statistics.median(getattr(step, name) / step.seconds for step in steps) / slowdown

    flops_rate, peak = rate("flops"), peak_rate(distributed.device())
    peaks = distributed.gather_objects(bench_run.peak_bytes)
    ranks = distributed.world_size()
    summary = {
        "method": bench_run.name,
        "kernels": bench_run.kernels,
        "tokens_per_second": rate("tokens"),
        "label_tokens_per_second": rate("label_tokens"),
        "step_seconds": {**seconds, "by_part": parts},
        "cpu_seconds": spread_of([step.cpu_seconds for step in steps]),
        "switch_seconds": switch,
        "switch_in_steps": switch["median"] / seconds["median"],
        "peak_bytes": max(peaks),
        "peak_bytes_by_rank": peaks,
        "flops_per_second": flops_rate or None,
        "utilisation": flops_rate / (peak * ranks) if peak is not None and flops_rate else None,
        "utilisation_of_ceiling": flops_rate / (ceilings["matrix_flops"] * ranks) if flops_rate else None,
        "measured_steps": len(steps),
    }
    if bench_run.draws:
        by_draw = over_draws(rounds, lambda round_: [step.seconds for step in round_.steps])
        summary["draws"] = {
            draw: {"blocks": blocks, "step_seconds": by_draw[draw]} for draw, blocks in bench_run.draws.items()
        }
    return summary


def ratio(bench_run: BenchRun, reference: BenchRun) -> dict[str, Any]:
    """Return the step time relative to the reference's: a ratio each round, their median and quartile distance.

    Where the draw matters the median is the mean of the draws' medians. ``cpu`` is the same of processor seconds, which
    other programs on the machine disturb far less.
    """
    pairs = list(zip(bench_run.rounds, reference.rounds))
    drawn = bench_run if bench_run.draws else reference

    def relative(name: str) -> dict[str, float]:
        found = [own.median(name) / other.median(name) for own, other in pairs]
        values = iter(found)
        by_draw = over_draws(drawn.rounds, lambda round_: [next(values)])
        return {**spread_of(found), "median": statistics.mean(by_draw.values())}

    return {**relative("seconds"), "cpu": relative("cpu_seconds")}
