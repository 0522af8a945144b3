"""Roofline estimate of a step's time from its work and a GPU's specs. An estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lisa_dist.config import Config
from lisa_dist.config.gpu import Gpu
from lisa_dist.config.placement import is_block_major
from lisa_dist.planning.simulation import Trace, micro_batches_per_step
from lisa_dist.sharding.ledger import Work
from lisa_dist.sharding.link import Link, Slot, Slots
from lisa_dist.sharding.waiting_states import StatesOnHost

# Shares of the makers' numbers that operations reach, rounded: as one H100 ran a step of an 8B model, kernel by kernel
# (docs/memory.md). Of other GPUs they are assumptions, as is that of links between GPUs everywhere.
MATRIX_EFFICIENCY = 0.71
ATTENTION_EFFICIENCY = 0.41  # 0.5 in its forward, 0.39 in its backward pass
MEMORY_EFFICIENCY = 0.8
HOST_EFFICIENCY = 0.85
LINK_EFFICIENCY = 0.8
FP32_SLOWDOWN = 16.0  # of matrix products in float32 without tensor cores (A100: 312 to 19.5 TFLOP/s)
HOST_OPTIMIZER_BANDWIDTH = 20e9  # bytes a second of host memory for a rank's optimizer step there


@dataclass(frozen=True)
class Estimate:
    """Seconds of an optimizer step: computing, communicating, copying from and to the host, and the step as a whole."""

    compute_seconds: float
    communication_seconds: float
    host_seconds: float
    step_seconds: float
    tokens_per_second: float  # of all ranks together

    @property
    def bound_by(self) -> str:
        """What takes longest of what a step does side by side: computing, communicating, or the host."""
        seconds = {
            "computing": self.compute_seconds,
            "communicating": self.communication_seconds,
            "host": self.host_seconds,
        }
        return max(seconds, key=lambda part: seconds[part])


def estimate(trace: Trace, gpu: Gpu, config: Config) -> Estimate:
    """Estimate the time of a step.

    Matrix products are bound by the matrix rate, thin ones by that or the memory, attention by a rate of its own, all
    other operators by the memory. Communication overlaps with computation but for the first block's gather and the
    last one's reduction.
    """
    work = trace.work
    compute = _compute_seconds(work, gpu, config)
    within = work.sent_within_nodes / (gpu.link_bandwidth_within_node * LINK_EFFICIENCY)
    across = work.sent_across_nodes / (gpu.link_bandwidth_across_nodes * LINK_EFFICIENCY)
    communication = within + across
    host = _host_seconds(trace, gpu, config)
    if trace.streamed[0].visits:
        step = _streamed_seconds(trace, gpu, config, compute)
    else:
        overlapped = communication + host[0]
        step = max(compute, overlapped) + min(compute, overlapped) / trace.num_blocks + host[1]
    return Estimate(compute, communication, sum(host), step, trace.tokens / step)


def _compute_seconds(work: Work, gpu: Gpu, config: Config) -> float:
    slowdown = FP32_SLOWDOWN if config.precision.compute == "float32" else 1.0
    bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    rate = gpu.matrix_flops / slowdown
    products = work.product_flops / (rate * MATRIX_EFFICIENCY)
    thin = max(work.thin_flops / (rate * MATRIX_EFFICIENCY), work.thin_bytes / bandwidth)
    return products + thin + work.attention_flops / (rate * ATTENTION_EFFICIENCY) + work.other_bytes / bandwidth


def _streamed_seconds(trace: Trace, gpu: Gpu, config: Config, compute: float) -> float:
    """Return the seconds of a step whose frozen blocks come from host memory, by the store's own order of copies.

    A backward pass, which computes its block again, takes twice as long as a forward pass for the same copy. So
    neither the sum of copies nor that of computing alone says how long a step takes. Frozen blocks that stay on the
    device lie evenly between those that are copied. What else is computed stands where the forward pass turns into the
    backward pass.
    """
    rounds = 1 if is_block_major(config.parallel, config.train) else micro_batches_per_step(config)
    forward, backward = trace.streamed
    blocks, reached = round(forward.visits / rounds), round(backward.visits / rounds)
    up, down = (_compute_seconds(work, gpu, config) for work in trace.streamed)
    rest = (compute - up - (down if reached else 0.0)) / rounds
    link = _TimedLink(gpu.host_bandwidth * HOST_EFFICIENCY)
    # Inputs that wait in host memory travel beside the blocks that are copied, those of other blocks too.
    pieces = micro_batches_per_step(config) if trace.waiting_bytes and reached else 1
    state = torch.empty(trace.waiting_bytes // max(pieces * reached, 1), dtype=torch.uint8, device="meta")
    weights = torch.empty(trace.host_bytes // blocks, dtype=torch.uint8, device="meta")
    slots = Slots(link, 1 + config.parallel.copied_ahead, 0, torch.device("meta"), lambda _: weights)
    passes = [(block, up / forward.visits) for block in range(blocks)]
    passes += [(block, down / backward.visits) for block in reversed(range(blocks - reached, blocks))]
    slots.expect([block for block, _ in passes])
    ends = []
    for _ in range(3):  # the first begins with empty slots
        states = StatesOnHost(link, 0)
        for place, (block, seconds) in enumerate(passes):
            link.now += rest if place == blocks else 0.0
            slot = slots.enter(block)
            for piece in range(pieces):
                if pieces > 1 and blocks > place >= blocks - reached:
                    states.put(block, piece, state)
                elif pieces > 1 and place >= blocks:
                    states.take(block, piece)
                link.now += seconds / pieces
            slots.leave(slot)
        link.now += 0.0 if reached else rest
        ends.append(link.now)
    return (ends[-1] - ends[-2]) * rounds


class _TimedLink(Link):
    """A link of so many bytes a second that knows when a copy is there, and until when what computes waits for it."""

    def __init__(self, rate: float) -> None:
        super().__init__("meta")
        self.rate = rate
        self.now = 0.0  # seconds since the start, where computing has got to
        self.copied = 0.0  # where copying to the device has
        self.sent = 0.0  # where copying from it has

    def _copy(self, slot: Slot, host: torch.Tensor) -> None:
        self.copied = max(self.copied, self.now if slot.free is None else slot.free) + host.nbytes / self.rate
        slot.filled = self.copied

    def wait(self, slot: Slot) -> None:
        self.now = max(self.now, slot.filled)

    def send(self, state: torch.Tensor, host: torch.Tensor) -> float:
        self.sent = max(self.sent, self.now) + host.nbytes / self.rate
        return self.sent

    def wait_sent(self, sent: float) -> None:
        self.now = max(self.now, sent)

    def hand_back(self, slot: Slot) -> None:
        slot.free = self.now


def _host_seconds(trace: Trace, gpu: Gpu, config: Config) -> tuple[float, float]:
    """Return the seconds of copies from and to host memory, which overlap, and of the optimizer's step there."""
    if config.parallel.offload == "none":
        return 0.0, 0.0
    if trace.streamed[0].visits or config.parallel.offload == "auto":
        return trace.work.link_bytes / (gpu.host_bandwidth * HOST_EFFICIENCY), 0.0
    sizes = trace.persistent_bytes
    copied = 2 * sizes["frozen_parameters"]  # to the device for the forward and for the backward pass
    stepped = 0
    if config.parallel.offload == "all":
        copied += 2 * sizes["active_parameters"] + sizes["gradients"]
        stepped = 2 * sizes["optimizer_state"] + 2 * sizes["active_parameters"] + sizes["gradients"]
    copying = copied * micro_batches_per_step(config) / (gpu.host_bandwidth * HOST_EFFICIENCY)
    return copying, stepped / HOST_OPTIMIZER_BANDWIDTH
