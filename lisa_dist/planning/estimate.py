"""Roofline estimate of a step's time from its work and a GPU's specs. An estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from lisa_dist.config import Config
from lisa_dist.config.gpu import Gpu
from lisa_dist.planning.simulation import Trace, micro_batches_per_step

# Shares of the makers' numbers that large operations reach in practice, rounded; assumptions, not measurements.
MATRIX_EFFICIENCY = 0.7
MEMORY_EFFICIENCY = 0.8
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


def estimate(trace: Trace, gpu: Gpu, config: Config) -> Estimate:
    """Estimate the time of a step.

    Matrix products are bound by the matrix rate or the memory, all other operators by the memory. Communication
    overlaps with computation but for the first block's gather and the last one's reduction.
    """
    work = trace.work
    slowdown = FP32_SLOWDOWN if config.precision.compute == "float32" else 1.0
    bandwidth = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    matrix = max(work.flops * slowdown / (gpu.matrix_flops * MATRIX_EFFICIENCY), work.matrix_bytes / bandwidth)
    compute = matrix + work.other_bytes / bandwidth
    within = work.sent_within_nodes / (gpu.link_bandwidth_within_node * LINK_EFFICIENCY)
    across = work.sent_across_nodes / (gpu.link_bandwidth_across_nodes * LINK_EFFICIENCY)
    communication = within + across
    host = _host_seconds(trace, gpu, config)
    overlapped = communication + host[0]
    step = max(compute, overlapped) + min(compute, overlapped) / trace.num_blocks + host[1]
    return Estimate(compute, communication, sum(host), step, trace.tokens / step)


def _host_seconds(trace: Trace, gpu: Gpu, config: Config) -> tuple[float, float]:
    """Return the seconds of copies from and to host memory, which overlap, and of the optimizer's step there."""
    if config.parallel.offload == "none":
        return 0.0, 0.0
    if trace.work.link_bytes or config.parallel.offload == "auto":
        return trace.work.link_bytes / (gpu.host_bandwidth * LINK_EFFICIENCY), 0.0
    sizes = trace.persistent_bytes
    copied = 2 * sizes["frozen_parameters"]  # to the device for the forward and for the backward pass
    stepped = 0
    if config.parallel.offload == "all":
        copied += 2 * sizes["active_parameters"] + sizes["gradients"]
        stepped = 2 * sizes["optimizer_state"] + 2 * sizes["active_parameters"] + sizes["gradients"]
    copying = copied * micro_batches_per_step(config) / (gpu.host_bandwidth * LINK_EFFICIENCY)
    return copying, stepped / HOST_OPTIMIZER_BANDWIDTH
