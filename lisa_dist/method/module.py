"""The model with everything that changes it: built here once for training, bench and plan alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_combinations, check_streamed
from lisa_dist.config.optimization import PARTS
from lisa_dist.config.placement import is_block_major
from lisa_dist.config.sampling import ProbeRequest
from lisa_dist.data.batches import MicroBatch
from lisa_dist.method import probes
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.method.optim.active_optimizer import ActiveOptimizer
from lisa_dist.method.optim.clipping import mean_norms
from lisa_dist.method.optim.parameter_groups import ParameterGroups, norms_and_biases
from lisa_dist.method.sampling import build_sampler
from lisa_dist.method.switch import (
    ActiveSet,
    RankSynchronizedSampler,
    always_active_parameters,
    drawable_modules,
    drawn_parts,
    switch_active_blocks,
    trained_parameters,
)
from lisa_dist.method.updates import Update, build_update
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.inspection import pretrained_architecture
from lisa_dist.models.kernels import choose_kernels, install_liger, knows_liger, loss_in_place
from lisa_dist.models.layer_map import LayerMap, block_of, find_layers
from lisa_dist.models.loading import initialize_random, load_pretrained, restore_buffers
from lisa_dist.models.masking import (
    REMEDY,
    Separation,
    check_length_of_rows,
    find_separation,
    install_position_handling,
    kernels_without_mask,
)
from lisa_dist.models.packed_attention import HEAD_MULTIPLE, WIDEST_HEAD
from lisa_dist.models.quantization import quantize_linears
from lisa_dist.objectives import Objective
from lisa_dist.objectives.supervised import prepare_supervised
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_count
from lisa_dist.sharding import build_store
from lisa_dist.sharding.block_major import check_block_major
from lisa_dist.sharding.compilation import compile_blocks
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.memory_policy import MemoryPolicy, host_states
from lisa_dist.sharding.store import ParameterStore, persistent_bytes

logger = logging.getLogger(__name__)

ComingBatches = Callable[[int], list[MicroBatch]]  # count -> this rank's next so many micro-batches


@dataclass
class TrainModule:
    """The model with everything that changes it: what a checkpoint holds, and what bench and plan drive too."""

    config: Config
    dims: ParallelDims
    store: ParameterStore
    update: Update
    optimizer: ActiveOptimizer
    sampler: RankSynchronizedSampler
    active: ActiveSet
    memory: MemoryPolicy
    objective: Objective
    kernels: str  # eager, liger or compile

    @property
    def period_length(self) -> int:
        """Optimizer steps of a period (K)."""
        return self.config.sampler.period


def build_train_module(
    config: Config, architecture: PretrainedConfig | None = None, dims: ParallelDims | None = None
) -> TrainModule:
    """Build the model on ``meta``, shard it, and make its optimizer and sampler; weights are still on ``meta``.

    Collective: every rank (the mesh).

    Args:
        config: the whole configuration.
        architecture: in place of what ``model.*`` names and its weights say.
        dims: where they are made already; None: those of ``parallel.*``.

    Raises:
        UserError: options exclude each other, or do not fit the model.
    """
    check_combinations(config)
    if architecture is None:
        architecture = pretrained_architecture(config.model, config.precision.frozen)
    module = build_meta_model(config.model, architecture)
    update = build_update(config.update)
    layers = find_layers(module, config.model.blocks)
    config.optimizer.check_tied(layers.tied)
    separation = separate_packed_samples(config, module, layers)
    if is_block_major(config.parallel, config.train):
        distributed.on_rank_zero(lambda: check_block_major(module, layers.blocks_path))
    update.prepare_model(module, layers)
    drawable = len(layers.blocks) + len(drawable_modules(config.sampler, layers))
    sampler = RankSynchronizedSampler(build_sampler(config.sampler, drawable, config.train.seed))
    kind = config.model.quantization
    if kind != "none" and not quantize_linears(layers.blocks, kind):
        raise UserError(f"model.quantization={kind}: this model has no layers for it")
    undecayed = frozenset() if config.optimizer.decay_norms_and_biases else norms_and_biases(module)
    # On a GPU compiled blocks were tried with weights on the device alone, and never with quantised ones.
    may_compile = config.parallel.offload == "none" and config.model.quantization == "none"
    kernels = choose_kernels(config.model.kernels, module, may_compile=may_compile)
    objective = prepare_supervised(module, layers, config.model, loss_in_place(kernels))
    install_position_handling(module, separation)
    state_bytes = optimizer_spec(config.optimizer).state_bytes
    memory = MemoryPolicy(config, lambda: build_update(config.update), state_bytes)
    memory.measure(module)
    install_kernels(config, module, layers, kernels)
    dims = dims or ParallelDims.of(config.parallel)
    check_streamed(config, dims.num_ranks)
    keeps_precision, waiting = update.keeps_precision, host_states(config, module, len(layers.blocks))
    store = build_store(module, layers, dims.mesh, config.parallel, config.precision, keeps_precision, waiting)
    active = ActiveSet(always_active_parameters(store, config.always_active))
    groups = ParameterGroups(layers.part_of, undecayed)
    optimizer = ActiveOptimizer(config.optimizer, update, groups, store.masters_to_params, store.register_grad_hook)
    built = TrainModule(config, dims, store, update, optimizer, sampler, active, memory, objective, kernels)
    if config.parallel.offload == "auto":
        keep_what_surely_fits(built)
    return built


def keep_what_surely_fits(train_module: TrainModule) -> None:
    """Let those frozen blocks be allocated on the device that may stay there whatever is drawn. No communication.

    So neither loading nor a switch needs host memory for more than the others. What needs most is tried on ``meta``:
    the largest blocks train, and a backward pass reaches all blocks.
    """
    store, config = train_module.store, train_module.config
    depth, listed = len(store.layers.blocks), config.sampler.listed_blocks
    sizes = [sum(store.parameter(name).numel() for name in store.block_parameters(block)) for block in range(depth)]
    count = min(train_module.sampler.sampler.num_active, depth)
    blocks = sorted(range(depth), key=sizes.__getitem__)[depth - count :] if listed is None else listed
    active = replace(train_module.active, blocks=blocks, modules=drawable_modules(config.sampler, store.layers))
    trained = trained_parameters(store, train_module.update, active)
    store.allocate(trained, torch.device("meta"))
    store.make_masters(trained)
    lowest = 0 if blocks and listed is None else store.lowest_reached()
    store.keep_on_device(train_module.memory.blocks_that_fit(store, blocks, lowest)[0])


def install_kernels(config: Config, module: nn.Module, layers: LayerMap, kernels: str) -> None:
    """Let ``kernels`` run the blocks. Call it when nothing else changes a forward.

    In a simulation, where nothing is compiled, Liger's stand in for compiled blocks where they are known to fit: such
    blocks were measured to need the same memory and time (docs/performance.md).
    """
    simulated = distributed.is_simulated()
    if kernels == "liger" or (kernels == "compile" and simulated and knows_liger(module)):
        install_liger(module, keep_inputs=config.parallel.activation_checkpointing in ("selective", "auto"))
    elif kernels == "compile" and not simulated:
        compile_blocks(module, layers.blocks, lengths_vary=not config.data.packing)


def separate_packed_samples(config: Config, module: nn.Module, layers: LayerMap) -> Separation | None:
    """Give ``module`` its attention of packed rows; return what keeps samples apart, None where nothing is packed.

    With ``model.attention=auto`` the first kernel that needs no dense mask and is right in a tiny copy; where there is
    none the model's own. Says where a mask is needed. Collective: every rank; rank 0 tries.

    Raises:
        UserError: ``data.packing=true`` and nothing keeps them apart in this model, or not in rows as long as they are.
    """
    if not config.data.packing:
        return None
    check_length_of_rows(module.config, config.data.sequence_length)
    kernel, separation = distributed.on_rank_zero(lambda: _find_packed_attention(config, module, layers.blocks_path))
    if kernel is not None:
        module.set_attn_implementation(kernel)  # type: ignore[operator]
    if separation == "mask" and distributed.is_main() and not distributed.is_simulated():
        entries = config.train.micro_batch_size * config.data.sequence_length**2
        logger.info(
            "data.packing=true: %s builds its attention masks without looking at positions, so packed samples are kept "
            "apart by an explicit mask: %s entries of a micro-batch, sequence length squared each",
            type(module).__name__,
            format_count(entries),
        )
    return separation


def _find_packed_attention(config: Config, module: nn.Module, blocks_path: str) -> tuple[str | None, Separation]:
    """Return the kernel for packed rows, None where it is the model's own, and what keeps samples apart with it."""
    wanted = config.model.attention
    if config.model.own_attention is not None:
        return None, find_separation(module, blocks_path)
    compiled = config.model.kernels == "compile" and not distributed.is_simulated()
    halved = config.precision.compute == "bfloat16"
    for kernel in kernels_without_mask(module, wanted, halved=halved, compiled=compiled):
        try:
            return kernel, find_separation(module, blocks_path, kernel)
        except UserError as error:
            if wanted != "auto":
                raise
            if not distributed.is_simulated():
                logger.info("model.attention=auto: not %s: %s", kernel, str(error).removesuffix(f"; {REMEDY}"))
    if wanted == "varlen":
        raise UserError(
            f"model.attention=varlen: on this GPU needs precision.compute=bfloat16, heads of at most {WIDEST_HEAD} "
            f"numbers, a multiple of {HEAD_MULTIPLE}, and no dropout in attention; use model.attention=auto"
        )
    return None, find_separation(module, blocks_path)


def allocate(
    train_module: TrainModule, active_blocks: list[int], device: torch.device, active_modules: Iterable[str] = ()
) -> None:
    """Allocate the shards for a set of active blocks, and of modules drawn beside them; weights are not yet filled."""
    train_module.active.blocks, train_module.active.modules = list(active_blocks), list(active_modules)
    trained = trained_parameters(train_module.store, train_module.update, train_module.active)
    train_module.store.allocate(trained, device)
    restore_buffers(train_module.store.module)


def add_trained_params(train_module: TrainModule) -> None:
    """Hand what trains to the optimizer, with zero state, now that its weights are there. No communication.

    What is kept of activations, and of frozen blocks on the device, follows from what masters leave of its memory.
    """
    trained = trained_parameters(train_module.store, train_module.update, train_module.active)
    train_module.store.make_masters(trained)
    train_module.optimizer.add_params({name: train_module.store.master(name) for name in trained})
    train_module.memory.apply(train_module.store, train_module.active.blocks, bool(train_module.active.drawn))


def load_initial_weights(train_module: TrainModule, device: torch.device) -> None:
    """Allocate the model and fill it from its directory, or at random. Collective: every rank."""
    blocks = list(range(len(train_module.store.layers.blocks)))
    # Where every block trains in every period, weights never pass through the frozen dtype.
    allocate(train_module, blocks if train_module.config.sampler.trains_all_blocks else [], device)
    if train_module.config.model.initialization == "random":
        added = initialize_random(train_module.store.module, train_module.config.train.seed)
    else:
        added = load_pretrained(train_module.store.module, str(train_module.config.model.path))
    parameters = {name: train_module.store.parameter(name) for name in train_module.store.names}
    train_module.update.initialize(parameters, added, train_module.config.train.seed)
    add_trained_params(train_module)


def begin_period(train_module: TrainModule, period: int, coming: ComingBatches | None = None) -> None:
    """Probe the model where the sampler wants it, draw the period's blocks and switch to them.

    Collective: every rank.

    Raises:
        UserError: the sampler needs calibration data and ``coming`` is None.
    """
    request = train_module.sampler.request(period)
    if request is not None:
        train_module.sampler.observe(probe(train_module, request, coming))
    store, update, active, config = train_module.store, train_module.update, train_module.active, train_module.config
    modules = drawable_modules(config.sampler, store.layers)
    drawn = drawn_parts(train_module.sampler.draw(period), len(store.layers.blocks), modules)
    switch_active_blocks(store, train_module.optimizer, update, active, drawn, period, config.train.seed)
    train_module.memory.apply(store, active.blocks, bool(active.drawn))


def probe(train_module: TrainModule, request: ProbeRequest, coming: ComingBatches | None) -> list[float]:
    """Return what the sampler asks for. Collective: every rank.

    Raises:
        UserError: it needs calibration data and ``coming`` is None.
    """
    if request.batches and coming is None:
        raise UserError(f"sampler={train_module.config.sampler.name}: needs calibration data, and there is none")
    micro_batches = [] if coming is None else coming(request.batches)
    store, objective, update, dims = train_module.store, train_module.objective, train_module.update, train_module.dims
    return probes.measure(request, store, objective, update, dims, micro_batches)


def observed_blocks(train_module: TrainModule) -> dict[int, list[str]]:
    """Return the names of what trains in each active block, where the sampler learns from the steps; else nothing."""
    return trained_by_block(train_module) if train_module.sampler.sampler.observes_steps else {}


def trained_by_block(train_module: TrainModule) -> dict[int, list[str]]:
    """Return the names of what trains in each active block."""
    named: dict[int, list[str]] = {block: [] for block in train_module.active.blocks}
    for name in train_module.optimizer.parameters:
        block = block_of(train_module.store.layers.group_of(name))
        if block is not None:
            named[block].append(name)
    return named


def observe_step(train_module: TrainModule, squared_norms: Mapping[int, float]) -> None:
    """Tell the sampler the squared gradient norm of each block of ``observed_blocks``. No communication."""
    sizes = {
        block: sum(train_module.store.parameter(name).numel() for name in names)
        for block, names in observed_blocks(train_module).items()
    }
    if sizes:
        train_module.sampler.observe_step({block: squared_norms[block] / max(size, 1) for block, size in sizes.items()})


def trained_norms(train_module: TrainModule) -> dict[int, float]:
    """Return the norm of what trains in each active block, by its fp32 masters. Collective: every rank."""
    parameters = train_module.optimizer.parameters
    blocks: dict[int, list[torch.Tensor]] = {
        block: [parameters[name] for name in names] for block, names in trained_by_block(train_module).items()
    }
    weights = [weight for of_block in blocks.values() for weight in of_block]
    return dict(zip(blocks, mean_norms(weights, 1, list(blocks.values()))[1:].tolist())) if weights else {}


def count_persistent_bytes(train_module: TrainModule) -> dict[str, int]:
    """Count this rank's persistent bytes by kind; all are there between the last backward and the optimizer step.

    ``offloaded_optimizer_state`` is in host memory; it is named only where there is any.
    """
    counted = {**persistent_bytes(train_module.store), "optimizer_state": train_module.optimizer.state_bytes()}
    waiting = train_module.optimizer.offloaded_bytes()
    return counted | ({"offloaded_optimizer_state": waiting} if waiting else {})


def count_trained_parameters(train_module: TrainModule) -> dict[str, int]:
    """Count the parameters, of all ranks together, that train now, by part: blocks, embeddings, norm, head."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in train_module.optimizer.parameters.items():
        counts[train_module.store.layers.part_of(name)] += parameter.numel()
    return counts
