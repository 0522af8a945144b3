"""The training loop.

At a period's first step switch the active blocks; then accumulate micro-batches, clip, step, record;
checkpoint on schedule or on a signal.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lisa_dist import distributed
from lisa_dist.active_blocks import ActiveSet, RankSynchronizedSampler, switch_active_blocks, trained_parameters
from lisa_dist.config import Config
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.loading import initialize_random, load_pretrained, restore_buffers
from lisa_dist.models.loss_head import install_loss_head
from lisa_dist.optim.active_optimizer import ActiveOptimizer
from lisa_dist.optim.clipping import normalize_and_clip
from lisa_dist.optim.schedule import learning_rate
from lisa_dist.sampling import build_sampler
from lisa_dist.sharding.wrapping_policy import ShardedModel, always_active_parameters, materialize, shard_model
from lisa_dist.updates import Update, build_update

logger = logging.getLogger(__name__)

MicroBatch = dict[str, torch.Tensor]
Stopwatch = Callable[[str], AbstractContextManager[None]]  # names the part of a step that its body is


class NonFiniteError(RuntimeError):
    """The loss or a gradient is not finite."""


@dataclass
class StepResult:
    """What one optimizer step found, equal on every rank."""

    loss: float  # mean over the label tokens of the global batch
    grad_norm: float  # before clipping
    tokens: int  # label tokens of the global batch
    lr: float
    stop_requested: bool  # a rank was asked to stop
    skipped: bool = False  # the loss or the gradient was not finite


def no_stopwatch(part: str) -> AbstractContextManager[None]:
    """Measure nothing."""
    return nullcontext()


def accumulate_gradients(
    learner: Learner, micro_batches: list[MicroBatch], stopwatch: Stopwatch = no_stopwatch
) -> tuple[float, int]:
    """Add up the gradients of a global batch. Collective: every rank, with equally many micro-batches.

    Returns:
        This rank's loss, summed over its label tokens, and their number.
    """
    module = learner.sharded.module
    loss_sum = torch.zeros((), device=next(module.parameters()).device)
    label_tokens = 0
    for index, micro_batch in enumerate(micro_batches):
        assert isinstance(module, FSDPModule)
        if learner.config.parallel.defer_reduction:
            module.set_requires_gradient_sync(index == len(micro_batches) - 1)
        label_tokens += count_label_tokens(micro_batch["labels"])
        inputs = {key: tensor.to(loss_sum.device, non_blocking=True) for key, tensor in micro_batch.items()}
        with stopwatch("forward"):
            loss = module(**inputs)
        with stopwatch("backward"):
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum.item(), label_tokens


def count_label_tokens(labels: torch.Tensor) -> int:
    """Count the tokens that carry loss; the first position predicts nothing and never does."""
    return int((labels[:, 1:] != -100).sum())


def train_step(
    learner: Learner,
    micro_batches: list[MicroBatch],
    step: int,
    max_steps: int,
    stop_requested: bool = False,
    stopwatch: Stopwatch = no_stopwatch,
) -> StepResult:
    """Make optimizer step ``step`` (counted from 0). Collective: every rank.

    Raises:
        NonFiniteError: with ``train.on_nonfinite=stop``; parameters are as they were before the step.
    """
    config = learner.config
    # Dropout depends on the step and the rank alone, so a resumed run draws the same.
    torch.manual_seed(hash((config.train.seed, step, distributed.rank())) % 2**63)
    local_loss, local_tokens = accumulate_gradients(learner, micro_batches, stopwatch)
    loss_sum, tokens, stops = distributed.all_reduce_sum([local_loss, local_tokens, float(stop_requested)])
    lr = learning_rate(config.scheduler, config.optimizer.lr, step, max_steps)
    with stopwatch("optimizer"):
        parameters = learner.optimizer.parameters.values()
        norm = normalize_and_clip(parameters, max(tokens, 1), config.optimizer.grad_clip).item()
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            learner.optimizer.step(lr)
        else:
            learner.optimizer.drop_gradients()
    result = StepResult(loss_sum / max(tokens, 1), norm, int(tokens), lr, stops > 0, skipped=not finite)
    if not finite and config.train.on_nonfinite == "stop":
        raise NonFiniteError(
            f"step {step + 1}: loss {result.loss} and gradient norm {norm} are not both finite; "
            "train.on_nonfinite=skip would leave such steps out"
        )
    return result


@torch.no_grad()
def mean_loss(learner: Learner, micro_batches: Iterator[MicroBatch] | list[MicroBatch]) -> float:
    """Return the mean loss over all label tokens of all ranks. Collective: every rank, equally many micro-batches."""
    module = learner.sharded.module
    module.eval()
    device = next(module.parameters()).device
    loss_sum, label_tokens = torch.zeros((), device=device), 0
    for micro_batch in micro_batches:
        label_tokens += count_label_tokens(micro_batch["labels"])
        loss_sum += module(**{key: tensor.to(device) for key, tensor in micro_batch.items()})
    module.train()
    total, tokens = distributed.all_reduce_sum([loss_sum.item(), float(label_tokens)])
    return total / max(tokens, 1)
