"""Runs the trainer's own step for one rank of an imagined cluster, under fake tensors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"
from transformers import PretrainedConfig

from lisa_dist.config import Config, ModelConfig, ParallelConfig, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations
from lisa_dist.config.paths import MODEL_CONFIG, model_directory
from lisa_dist.config.placement import inputs_wait_in_host_memory, is_block_major
from lisa_dist.config.sampling import FixedSamplerConfig, SamplerConfig, UniformSamplerConfig
from lisa_dist.data.batches import MicroBatch
from lisa_dist.method.module import add_trained_params, allocate, begin_period, build_train_module
from lisa_dist.method.sampling import build_sampler
from lisa_dist.models.architecture import read_architecture, set_depth
from lisa_dist.models.inspection import ties_differ
from lisa_dist.planning.phases import (
    STREAMED_BACKWARD,
    STREAMED_FORWARD,
    SWITCH,
    StepPhases,
    work_of_passes,
    work_of_step,
)
from lisa_dist.runtime.garbage import no_garbage_collection
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.ledger import Ledger, Work, sum_of_work
from lisa_dist.sharding.waiting_states import UNDER_WAY
from lisa_dist.training.step import train_step


@dataclass
class Trace:
    """What one rank, the one with the largest shards, needs in a step and in the switch before it.

    A phase is ``switch of active blocks``, ``optimizer``, or ``forward of X`` and ``backward of X`` where X is
    ``embeddings``, ``norm``, ``head`` or ``block I of L``.
    """

    num_blocks: int
    num_active: int  # blocks that train at a time
    persistent_bytes: dict[str, int]  # by kind, as training counts them before the optimizer's step
    host_bytes: int  # of these, in host memory
    peaks: dict[str, int]  # the most device bytes alive at once, by phase
    work: Work  # of one optimizer step
    tokens: int  # of one optimizer step, over all ranks
    kernels: str = "eager"  # what runs the blocks: eager, liger or compile
    waiting_bytes: int = 0  # of the inputs of blocks that wait in host memory
    # Of the work, the forward and the backward passes of frozen blocks, with visits of those that are copied for them.
    streamed: tuple[Work, Work] = field(default_factory=lambda: (Work(), Work()))

    @property
    def peak_at(self) -> str:
        """The phase of the peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def peak_bytes(self) -> int:
        """The most device bytes alive at once."""
        return self.peaks[self.peak_at]


def cluster_dims(config: ParallelConfig) -> ParallelDims:
    """Return how the ranks of the cluster that ``parallel.nodes`` and ``parallel.nproc_per_node`` describe are used.

    Raises:
        UserError: they are not replicate x shard.
    """
    return ParallelDims.of(config, config.nodes * ranks_per_node(config))


def ranks_per_node(config: ParallelConfig) -> int:
    """Return the ranks of one machine; ``auto`` is one: the GPUs of this machine say nothing of the cluster's."""
    return 1 if config.nproc_per_node == "auto" else int(config.nproc_per_node)


def micro_batches_per_step(config: Config) -> int:
    """Return the micro-batches of a rank in a step, rounded up to equally many on every rank."""
    at_once = config.train.micro_batch_size * cluster_dims(config.parallel).data_ranks
    return math.ceil(config.train.global_batch_size / at_once)


def simulated_micro_batches(config: Config) -> int:
    """Return how many micro-batches of a step say what all need: the first, one like all in between, the last.

    The last is another one where the gradients of a step are sent with it.
    """
    return min(micro_batches_per_step(config), 2 if cluster_dims(config.parallel).num_ranks == 1 else 3)


def architecture_of(config: ModelConfig) -> PretrainedConfig:
    """Return the architecture that ``model.*`` names; of weights that are there, only ties are looked at."""
    architecture = read_architecture(config, without_weights=True)
    directory = model_directory(str(config.path)) if config.path else None
    is_tied = getattr(architecture, "tie_word_embeddings", False) and config.initialization == "pretrained"
    if is_tied and directory is not None and any(directory.glob("*.safetensors")):
        try:
            if ties_differ(config, architecture, directory):
                architecture.tie_word_embeddings = False
                found = f"model.path={directory}: planned with a head of its own, as in the weights"
                warnings.warn(found, stacklevel=1)
        except UserError as error:
            warnings.warn(f"planned as {MODEL_CONFIG} says, whatever the weights are: {error}", stacklevel=1)
    return architecture


def extreme_sets(
    config: Config, own_depth: int, num_blocks: int | None = None, least_work: bool = False
) -> tuple[list[int], list[int]]:
    """Return the sets of blocks, before and after a switch, that need the most memory.

    The model has ``own_depth`` blocks; the sets are chosen for a depth of ``num_blocks``, None: its own. With
    ``least_work`` the set after the switch is that of the shortest backward pass.
    """
    listed = config.sampler.listed_blocks
    if listed is not None:
        return listed, listed
    depth = num_blocks or own_depth
    count = build_sampler(config.sampler, own_depth).num_active
    count = depth if count == own_depth else count
    last = list(range(depth - count, depth))
    if last and not config.always_active.embeddings and not least_work:
        last[0] = 0
    return list(range(count)), last


@contextmanager
def simulated_world(ranks: int) -> Iterator[None]:
    """Let this process be rank 0, whose shards are the largest, of a world without any other process."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def follow(first: Trace, second: Trace, steps: int) -> Trace:
    """Follow the line from one trace through another, of one block or one micro-batch more, so many steps."""

    def along(less: int, more: int) -> int:
        return less + steps * (more - less)

    def work_along(less: Work, more: Work) -> Work:
        return sum_of_work([less, more], [1 - steps, steps])

    sizes = second.persistent_bytes
    return replace(
        first,
        persistent_bytes={kind: along(size, sizes[kind]) for kind, size in first.persistent_bytes.items()},
        host_bytes=along(first.host_bytes, second.host_bytes),
        waiting_bytes=along(first.waiting_bytes, second.waiting_bytes),
        peaks={phase: along(peak, second.peaks[phase]) for phase, peak in first.peaks.items()},
        work=work_along(first.work, second.work),
        streamed=(work_along(first.streamed[0], second.streamed[0]), work_along(first.streamed[1], second.streamed[1])),
    )


def simulate(config: Config, num_blocks: int | None = None, least_work: bool = False, made: int | None = None) -> Trace:
    """Build the model and make a switch and a step for one rank of the configured cluster. No memory is used.

    The blocks that train are those for which the need is largest: the last, whose gradients arrive while all
    activations are alive; where the embeddings are frozen also the first, so that no block's backward is left out.

    Args:
        config: the configuration of a training run on that cluster.
        num_blocks: another depth of the model; as many blocks train as at its own depth, or again all.
        least_work: let the last blocks train alone, of which the backward pass is the shortest.
        made: how many micro-batches of the step are made, where they pass one block at a time together; None: as
            many as say what all need.

    Raises:
        UserError: the configuration fits neither the model nor the cluster.
    """
    check_combinations(config)  # here the sampler is still the configured one
    micro_batches, block_major = micro_batches_per_step(config), is_block_major(config.parallel, config.train)
    # Each adds the same bytes and operations from the second one on, or where more inputs wait than are on their way.
    enough = 2 + UNDER_WAY if inputs_wait_in_host_memory(config.parallel, config.train) else 2
    if block_major and made is None and micro_batches > enough + 1:
        less, more = (simulate(config, num_blocks, least_work, count) for count in (enough, enough + 1))
        return follow(less, more, micro_batches - enough)
    made = made or (micro_batches if block_major else simulated_micro_batches(config))
    architecture = architecture_of(config.model)
    before, blocks = extreme_sets(config, architecture.num_hidden_layers, num_blocks, least_work)
    if num_blocks is not None:
        set_depth(architecture, num_blocks)
    period = config.sampler.period
    sampler: SamplerConfig = FixedSamplerConfig(blocks=blocks, period=period)
    if not blocks:
        sampler = UniformSamplerConfig(active_layers=0, period=period)
    config = replace(config, sampler=sampler)
    dims = cluster_dims(config.parallel)
    check_accumulation(config, dims.data_ranks)
    # Fake tensors are so many objects that looking for garbage among them takes a third of the time.
    with simulated_world(dims.num_ranks), no_garbage_collection():
        train_module = build_train_module(config, architecture)
        ledger = Ledger(ranks_per_node(config.parallel))
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            allocate(train_module, before, torch.device("cpu"))
            add_trained_params(train_module)
            clock = StepPhases(train_module, ledger)
            clock.watch_modules()
            clock.move_to_host()
            ledger.phase = ledger.scope = SWITCH
            begin_period(train_module, 0)
            clock.move_to_host()
            batches = [_micro_batch(config) for _ in range(made)]
            with torch.compiler.set_stance("force_eager"):  # an optimizer may compile its own step
                train_step(train_module, batches, 0, 2, stopwatch=clock)
            # Any step but the first after a switch begins with what is there at its end.
            ledger.work["optimizer"].link_bytes -= train_module.store.link_bytes_ahead()
        counts = (1, 1) if block_major else (micro_batches, made)
        return Trace(
            num_blocks=len(train_module.store.layers.blocks),
            num_active=len(blocks),
            persistent_bytes=clock.persistent_bytes,
            host_bytes=clock.host_bytes,
            peaks={phase: peak for phase, peak in ledger.peaks.items() if phase != "start"},
            work=work_of_step(ledger.work, *counts),
            kernels=train_module.kernels,
            waiting_bytes=clock.waiting_bytes,
            tokens=micro_batches * config.train.micro_batch_size * dims.data_ranks * config.data.sequence_length,
            streamed=(
                work_of_passes(ledger.work, *counts, [STREAMED_FORWARD]),
                work_of_passes(ledger.work, *counts, [STREAMED_BACKWARD]),
            ),
        )


def _micro_batch(config: Config) -> MicroBatch:
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.zeros(shape, dtype=torch.int64),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
    }
