"""Prints the table of docs/memory.md: what one card can train, by the first settings of a ladder whose plan fits it."""

from __future__ import annotations

import functools
import itertools
import logging

from lisa_dist.config import Config
from lisa_dist.config.gpu import read_gpu
from lisa_dist.config.loading import load
from lisa_dist.planning.changes import Plan
from lisa_dist.planning.estimate import estimate
from lisa_dist.planning.prediction import predict_over_draws
from lisa_dist.planning.simulation import Trace
from lisa_dist.runtime.units import GIB

CARDS = ["rtx5070", "rtx5080", "rtx4090", "rtx5090", "l40s", "h100_80gb", "h200_141gb"]
MODELS = ["qwen3_4b", "llama3_1_8b", "qwen3_14b", "qwen3_32b", "llama3_1_70b"]
ONE_SEQUENCE = ["data.sequence_length=2048", "train.micro_batch_size=1", "train.global_batch_size=1"]
ONE_GPU = ["parallel.nodes=1", "parallel.nproc_per_node=1"]
# What each rung adds to those before it, so that each needs less memory than they do.
LADDER = {
    "A": ["method=lisa"],
    "B": ["parallel.activation_checkpointing=full"],
    "C": ["always_active.embeddings=false", "always_active.norm=false", "always_active.head=false"],
    "D": ["sampler.active_layers=1"],
    "E": ["parallel.offload=frozen"],
    "F": ["parallel.prefetch=1"],
}
SETTINGS = dict(zip(LADDER, itertools.accumulate(LADDER.values())))


@functools.cache
def traced(model: str, rung: str) -> tuple[Config, Trace]:
    """Return the configuration of a rung, and what a simulated step of it needs on any card."""
    config = load([f"model={model}", *ONE_SEQUENCE, *ONE_GPU, *SETTINGS[rung]])
    return config, predict_over_draws(config)[0]


def cell_of(model: str, card: str) -> str:
    """Return the first rung that fits with its peak, tokens/s and GiB in host memory; a dash where none does."""
    gpu = read_gpu(card)
    for rung, settings in SETTINGS.items():
        config, trace = traced(model, rung)
        plan = Plan(settings, config, gpu, trace, estimate(trace, gpu, config))
        if plan.fits:
            host_bytes = trace.host_bytes + trace.waiting_bytes
            host = f" + {host_bytes / GIB:.0f} host" if host_bytes else ""
            speed = float(f"{plan.estimate.tokens_per_second:.2g}")  # as many digits as an estimate bears
            return f"**{rung}** {trace.peak_bytes / GIB:.1f}{host}; {speed:,.0f}"
    return "-"


def table() -> str:
    """Return the table, a row for each card."""
    head = [f"| card | {' | '.join(f'`{model}`' for model in MODELS)} |", "| --- |" + " --- |" * len(MODELS)]
    rows = [f"| `{card}` | {' | '.join(cell_of(model, card) for model in MODELS)} |" for card in CARDS]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    logging.disable(logging.INFO)  # every simulation builds a model, which would say so
    print(table())
