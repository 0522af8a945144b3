"""How long the parts of a step take, and how much memory they need."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

START = "the peak counts from here"  # a mark in the profiler's record
PEAK_MEANINGS = {
    "cuda": "bytes of tensors, by torch.cuda.max_memory_allocated",
    "cpu": "bytes of tensors, by the profiler's allocation events",
}


def spread_of(values: list[float]) -> dict[str, float]:
    """Return the ``median`` of values and their ``spread``, the distance from the first to the third quartile."""
    first, median, third = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "spread": third - first}


class Stopwatch:
    """Adds up the seconds of each named part of a step; ``with stopwatch("forward"): ...``.

    On a GPU the parts are timed by events on the current stream, so that measuring makes the host wait nowhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time the body as a part of the step."""
        if self.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self.events.append((part, start, end))
            return
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds by part since the last call; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            for part, start, end in self.events:
                self.seconds[part] = self.seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
            self.events.clear()
        taken, self.seconds = self.seconds, {}
        return taken


class PeakMemory:
    """The most bytes of tensors that the body held at a time since :meth:`start`, beyond those from before the body.

    On a GPU from the caching allocator (``max_memory_allocated``). On a CPU from the profiler's record of every
    allocation: the resident set of the process holds far more than tensors, and its peak can't be reset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self.before = 0
        self.profile: profile | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        return self

    def start(self) -> None:
        """Leave out of the peak what was before, such as the loading of weights; what is still held counts."""
        if self.profile is None:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with record_function(START):
                pass

    def __exit__(self, *failure: object) -> None:
        if self.profile is None:
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.profile.__exit__(None, None, None)
        self.bytes = _peak_of_events(self.profile)
        self.profile = None


def _peak_of_events(recorded: profile) -> int:
    """Return the largest running sum, from the mark on, of allocations (positive) and releases (negative)."""
    results: Any = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = results.events()
    start = max((event.start_ns() for event in events if event.name() == START), default=0)
    memory = [event for event in events if event.name() == "[memory]"]
    peak = held = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= start:
            peak = max(peak, held)
    return peak
