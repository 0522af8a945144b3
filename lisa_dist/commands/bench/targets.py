"""What the bench measures: the trainer's own steps under a method, and a plain FSDP2 loop to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lisa_dist.commands.bench.steps import HORIZON, StepClock
from lisa_dist.config import Config, ModelConfig, UserError
from lisa_dist.data.batches import GlobalBatches, MicroBatch
from lisa_dist.method.module import begin_period, build_train_module, load_initial_weights
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.method.sampling import build_sampler
from lisa_dist.method.switch import RankSynchronizedSampler
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.inspection import pretrained_architecture
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.loading import initialize_random, load_pretrained, restore_buffers
from lisa_dist.runtime import distributed
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.rounding import dtype_of
from lisa_dist.training.flops import step_flops
from lisa_dist.training.step import PhaseTimer, dry_run_batch, train_step

FSDP_BASELINE = "fsdp_baseline"


MakeStep = Callable[[list[MicroBatch], PhaseTimer], None]
Flops = Callable[[np.ndarray], float | None]


class BenchTarget(Protocol):
    """Something whose steps are measured. Every method is collective: every rank."""

    model: nn.Module
    kernels: str  # eager, liger or compile

    def dry_run_batch(self, micro_batch: MicroBatch) -> None:
        """Run the longest micro-batch without a step."""

    def switch(self, blocks: list[int] | None = None) -> None:
        """Begin a period, of these blocks, or of those that the target draws."""

    def make_steps(self, clock: StepClock, count: int) -> None:
        """Make optimizer steps, each of them measured."""


def uncounted(lengths: np.ndarray) -> None:
    """Say of a step over samples of so many tokens that its operations are not counted."""


def measure_each(step: MakeStep, flops: Flops, clock: StepClock, count: int) -> None:
    """Call ``step`` so often, each time with the micro-batches of a step. Collective: every rank."""
    for _ in range(count):
        clock.start()
        step(clock.next_batches(), clock.stopwatch)
        clock.stop(flops)


class GivenDraw(RankSynchronizedSampler):
    """A sampler whose draw can be given; all else, such as a probe before it, is as it was."""

    blocks: list[int] | None = None  # the next draw; None: the sampler's own

    def draw(self, period: int) -> list[int]:
        """Return the given blocks, or else those drawn. Collective: every rank."""
        drawn = super().draw(period)
        return drawn if self.blocks is None else self.blocks


class MethodTarget:
    """The trainer's own functions, as training calls them. Collective to build: every rank."""

    def __init__(self, config: Config, batches: GlobalBatches) -> None:
        self.train_module = build_train_module(config)
        self.model = self.train_module.store.module
        self.kernels = self.train_module.kernels
        load_initial_weights(self.train_module, distributed.device())
        self.draw = self.train_module.sampler = GivenDraw(self.train_module.sampler.sampler)
        self.batches = batches
        self.period = 0
        self.steps = 0

    def dry_run_batch(self, micro_batch: MicroBatch) -> None:
        dry_run_batch(self.train_module, micro_batch)

    def switch(self, blocks: list[int] | None = None) -> None:
        self.draw.blocks = blocks
        begin_period(
            self.train_module,
            self.period,
            partial(self.batches.coming_micro_batches, self.steps * self.batches.global_batch_size),
        )
        self.period += 1

    def make_steps(self, clock: StepClock, count: int) -> None:
        measure_each(self._step, partial(step_flops, self.train_module), clock, count)

    def _step(self, micro_batches: list[MicroBatch], stopwatch: PhaseTimer) -> None:
        train_step(self.train_module, micro_batches, self.steps, HORIZON, stopwatch=stopwatch)
        self.steps += 1


def fill_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Allocate a model on ``meta`` on this rank's device, with the weights to start from. Collective: every rank."""
    model.to_empty(device=distributed.device())
    restore_buffers(model)
    if config.initialization == "random":
        initialize_random(model, seed)
    else:
        load_pretrained(model, str(config.path))


class FsdpBaseline:
    """FSDP2 as its tutorial has it, over the same model: the blocks and the root wrapped, the optimizer of the
    configuration, torch's clipping, the model's own loss. It trains what the method trains in its first period, and
    nothing else ever.

    Collective to build: every rank.
    """

    kernels = "eager"

    def __init__(self, config: Config, batches: GlobalBatches) -> None:
        if not config.update.is_plain:
            raise UserError(
                f"bench.compare={FSDP_BASELINE}: trains whole blocks by their own gradients, which "
                f"update={config.update.name} does not; choose update=full_rank"
            )
        if config.sampler.draws_non_block_modules:
            raise UserError(
                f"bench.compare={FSDP_BASELINE}: draws among the blocks alone, and not embeddings and head; "
                "choose sampler.non_block_modules=false"
            )
        self.config = config
        self.model = build_meta_model(config.model, pretrained_architecture(config.model, config.precision.frozen))
        layers = find_layers(self.model, config.model.blocks)
        precision, always = config.precision, config.always_active
        sampler = build_sampler(config.sampler, len(layers.blocks), config.train.seed)
        if sampler.wants_probe(0):
            raise UserError(
                f"bench.compare={FSDP_BASELINE}: trains the blocks of the first draw, before which "
                f"sampler={config.sampler.name} probes the model; choose another sampler"
            )
        active = RankSynchronizedSampler(sampler).draw(0)
        for index, block in enumerate(layers.blocks):
            if index not in active:
                block.requires_grad_(False).to(dtype_of(precision.frozen))
        outside = ((layers.embeddings, always.embeddings), (layers.norm, always.norm), ([layers.head], always.head))
        for modules, trains in outside:
            for module in modules:
                module.requires_grad_(trains)
        compute, reduce = dtype_of(precision.compute), dtype_of(precision.reduce)
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
        mesh, reshards = ParallelDims.of(config.parallel).mesh, config.parallel.reshard_after_forward
        for module in (*layers.blocks, self.model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
        self.device = distributed.device()
        fill_weights(self.model, config.model, config.train.seed)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # One group for all, decayed alike: it changes no step's time.
        group = {"params": self.trained, "weight_decay": config.optimizer.weight_decay}
        self.optimizer = optimizer_spec(config.optimizer).build([group])

    def dry_run_batch(self, micro_batch: MicroBatch) -> None:
        self._loss(micro_batch).backward()
        self.optimizer.zero_grad()

    def switch(self, blocks: list[int] | None = None) -> None:
        """Nothing switches here."""

    def make_steps(self, clock: StepClock, count: int) -> None:
        measure_each(self._step, uncounted, clock, count)

    def _step(self, micro_batches: list[MicroBatch], stopwatch: PhaseTimer) -> None:
        total = torch.zeros((), device=self.device)
        for micro_batch in micro_batches:
            with stopwatch("forward"):
                loss = self._loss(micro_batch)
            with stopwatch("backward"):
                (loss / len(micro_batches)).backward()
            total += loss.detach()
        with stopwatch("optimizer"):
            if self.config.optimizer.grad_clip > 0:
                nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        total.item()

    def _loss(self, micro_batch: MicroBatch) -> torch.Tensor:
        inputs: Any = {
            key: tensor.to(self.device, non_blocking=True) for key, tensor in micro_batch.items() if key != "cu_seqlens"
        }
        return self.model(**inputs, use_cache=False).loss
