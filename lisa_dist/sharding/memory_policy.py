"""What stays on the device, by its memory: of activations, and of frozen blocks; by ``auto`` anew after each switch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_dist.config import Config, UserError
from lisa_dist.config.placement import inputs_wait_in_host_memory, is_block_major, micro_batches_together
from lisa_dist.models.architecture import original_class, set_depth
from lisa_dist.models.layer_map import LayerMap, find_layers
from lisa_dist.models.masking import one_sample_a_row
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.runtime.units import GIB, format_bytes
from lisa_dist.sharding.activation_checkpointing import KINDS, OPERATIONS_PER_BYTE, Cost, choose, set_checkpointing
from lisa_dist.sharding.ledger import Ledger
from lisa_dist.sharding.rounding import dtype_of
from lisa_dist.sharding.store import ParameterStore, persistent_bytes
from lisa_dist.sharding.waiting_states import UNDER_WAY, HostStates

logger = logging.getLogger(__name__)

GOLDEN_RATIO = (5**0.5 - 1) / 2
RESERVED_BYTES = 2 * GIB  # CUDA's context, workspaces of libraries, NCCL's buffers, fragmentation
EVERYTHING = float("inf")


class PreparesBlocks(Protocol):
    """What is asked of an update: what it adds to a model, and what of a block it trains."""

    def prepare_model(self, model: nn.Module, layers: LayerMap) -> None: ...

    def trainable_parameters(self, names: list[str]) -> list[str]: ...


@dataclass
class MemoryPolicy:
    """Sets every block's kind of checkpointing and its place; for ``auto``, ``measure`` comes once before."""

    config: Config
    new_update: Callable[[], PreparesBlocks]  # one that has seen no model
    state_bytes: Callable[[torch.Tensor], int]  # of the optimizer, for a shard that it steps
    costs: dict[bool, dict[str, Cost]] = field(default_factory=dict)  # by whether the block is active, and kind

    def measure(self, model: nn.Module) -> None:
        """Measure, for ``auto``, what each kind costs a block of ``model``, of which only the architecture counts."""
        parallel = self.config.parallel
        if "auto" in (parallel.activation_checkpointing, parallel.offload):
            for trains in (True, False):
                self.costs[trains] = measure_costs(self.config, model, self.new_update, trains)

    def apply(self, store: ParameterStore, active_blocks: list[int], is_drawn: bool) -> None:
        """Place frozen blocks and set every block's kind for the blocks that train now. No communication.

        Before anything ``is_drawn``, the frozen blocks stay where they were allocated.
        """
        if self.config.parallel.offload == "auto" and is_drawn:
            self._keep_what_fits(store, active_blocks)
        self._set_kinds(store, active_blocks)

    def _set_kinds(self, store: ParameterStore, active_blocks: list[int]) -> None:
        if is_block_major(self.config.parallel, self.config.train):
            return  # every block is computed again as it is
        setting, blocks = self.config.parallel.activation_checkpointing, store.layers.blocks
        if setting != "auto":
            for index, block in enumerate(blocks if setting != "none" else []):
                set_checkpointing(block, "none" if store.recomputes(index) else setting)
            return
        lowest = store.lowest_reached()
        recomputed = [index for index in range(lowest, len(blocks)) if store.recomputes(index)]
        active = [index for index in active_blocks if index >= lowest and index not in recomputed]
        frozen = [index for index in range(lowest, len(blocks)) if index not in [*active, *recomputed]]
        budget = self._budget(store)
        budget = max(0.0, budget - len(recomputed) * self.costs[False]["full"].bytes)
        kinds = choose(self.costs, {True: len(active), False: len(frozen)}, budget)
        for index in [*range(lowest), *recomputed]:
            set_checkpointing(blocks[index], "none")
        for indices, trains in ((active, True), (frozen, False)):
            for index, kind in zip(indices, kinds[trains]):
                set_checkpointing(blocks[index], kind)
        logger.info(
            "activation checkpointing for %s: %s",
            "any amount of activations" if budget == EVERYTHING else f"{format_bytes(budget)} of activations",
            "; ".join(
                f"{', '.join(f'{kinds[trains].count(kind)} {kind}' for kind in KINDS)} of the {name} blocks"
                for trains, name in ((True, "active"), (False, "frozen"))
            ),
        )

    def _budget(self, store: ParameterStore) -> float:
        working_bytes = max(self.costs[True]["none"].bytes, self.costs[False]["none"].bytes)
        return activation_budget(self.config, store, working_bytes, self.state_bytes)

    def blocks_that_fit(self, store: ParameterStore, active_blocks: list[int], lowest: int) -> tuple[list[int], float]:
        """Return as many frozen blocks as fit on the device beside the activations, and the bytes left without them.

        They lie evenly over the depth, so that the others are copied while they compute, in an order that does not
        depend on what trains, so that a switch moves few. Negative bytes are lacking though every frozen block streams.

        Args:
            store: whose storage, on ``meta`` too, is that of these active blocks.
            active_blocks: those that train.
            lowest: the lowest block that a backward pass reaches.
        """
        sizes, kind = store.frozen_block_bytes(), self.config.parallel.activation_checkpointing
        left = self._budget(store) + sum(size for block, size in sizes.items() if not store.recomputes(block))
        extra: dict[int, int] = {}
        if is_block_major(self.config.parallel, self.config.train):
            left -= self._inputs_of_all_micro_batches(len(store.layers.blocks) - lowest)
            lowest = len(store.layers.blocks)  # none of them keeps more
        for block in range(lowest, len(store.layers.blocks)):
            cost = self.costs[block in active_blocks]
            left -= cost["full" if block in sizes else kind].bytes
            extra[block] = cost[kind].bytes - cost["full"].bytes  # kept where it is not computed again
        kept, rest = [], left
        for block in sorted(sizes, key=lambda block: block * GOLDEN_RATIO % 1):
            rest -= sizes[block] + extra.get(block, 0)
            if rest < 0:
                break
            kept.append(block)
        return kept, left

    def _inputs_of_all_micro_batches(self, blocks: int) -> int:
        """Return the bytes of the inputs that wait for so many blocks, of what comes out of them, and of arguments."""
        micro_batches, passing = micro_batches_together(self.config.parallel, self.config.train), 0
        if inputs_wait_in_host_memory(self.config.parallel, self.config.train):
            blocks, passing = 0, 1 + UNDER_WAY  # the input of the block that computes, and those on their way to it
        return (micro_batches * (blocks + 2) + passing) * self.costs[False]["full"].bytes

    def _keep_what_fits(self, store: ParameterStore, active_blocks: list[int]) -> None:
        """Let as many frozen blocks stay on the device as fit; the others stream.

        Raises:
            UserError: not even one block at a time fits.
        """
        kept, left = self.blocks_that_fit(store, active_blocks, store.lowest_reached())
        if left < 0:
            raise UserError(
                f"parallel.offload=auto: needs {format_bytes(-left)} more with every frozen block in host memory; "
                "raise parallel.memory_limit, or lower train.micro_batch_size, data.sequence_length or "
                "sampler.active_layers"
            )
        store.keep_on_device(kept)
        count = len(store.frozen_block_bytes())
        logger.info("parallel.offload=auto: %d of %d frozen blocks stay on the device", len(kept), count)


def host_states(config: Config, model: Any, num_blocks: int) -> HostStates | None:
    """Return the inputs of a model's blocks that wait in host memory; None where they wait on the device."""
    if not inputs_wait_in_host_memory(config.parallel, config.train):
        return None
    width = model.config.get_text_config(decoder=True).hidden_size
    numbers = config.train.micro_batch_size * config.data.sequence_length * width
    micro_batches = micro_batches_together(config.parallel, config.train)
    return HostStates(numbers * dtype_of(config.precision.compute).itemsize, num_blocks * micro_batches)


def activation_budget(
    config: Config, store: ParameterStore, working_bytes: int, state_bytes: Callable[[torch.Tensor], int]
) -> float:
    """Return the bytes that activations may take on this rank; infinite on a CPU without ``parallel.memory_limit``.

    Negative where what else is needed does not fit.

    From the device's memory go what is set aside, the persistent bytes, the gradients still to come, and what
    passes: what the store gathers and reduces, and a block's computation.
    """
    limit = memory_limit(config)
    if limit is None:
        return EVERYTHING
    counted = persistent_bytes(store)
    masters = [store.master(name) for name in store.names if store.parameter(name).requires_grad]
    shards = [local_shard(master.detach()) for master in masters]
    optimized = sum(shard.numel() for shard in shards)
    state = sum(state_bytes(shard) for shard in shards)
    gradients = dtype_of(config.precision.active).itemsize * optimized
    held = sum(counted.values()) - counted["gradients"] + gradients + state
    hosted = [store.parameter(name).detach() for name in store.names if store.on_host(name)]
    held -= held if config.parallel.offload == "all" else sum(local_shard(tensor).nbytes for tensor in hosted)
    return limit - RESERVED_BYTES - held - store.transient_bytes() - working_bytes


def memory_limit(config: Config) -> float | None:
    """Return the bytes of device memory that a rank may use; None where there is no limit."""
    if config.parallel.memory_limit is not None:
        return config.parallel.memory_limit * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return None


def measure_costs(
    config: Config, model: nn.Module, new_update: Callable[[], PreparesBlocks], trains: bool
) -> dict[str, Cost]:
    """Run the first block of ``model`` under fake tensors, once for each kind, and return what each costs.

    Args:
        config: says how large a micro-batch is.
        model: only its architecture is looked at.
        new_update: prepares the block; the model's own update would afterwards know this block's parameters alone.
        trains: whether the block is active.
    """
    measured = {kind: _measure(config, model, new_update(), trains, kind) for kind in KINDS}
    least = measured["none"].recompute
    return {kind: Cost(cost.bytes, cost.recompute - least) for kind, cost in measured.items()}


def _measure(config: Config, whole: nn.Module, update: PreparesBlocks, trains: bool, kind: str) -> Cost:
    """Return the bytes a block keeps, and all operations of its backward pass."""
    architecture: Any = copy.deepcopy(whole.config)
    set_depth(architecture, 1)
    compute = dtype_of(config.precision.compute)
    with torch.device("meta"):  # peft moves the adapters that it makes, which torch refuses for most fake tensors
        model: Any = original_class(whole)._from_config(architecture, dtype=compute)
    layers = find_layers(model.train(), config.model.blocks)
    update.prepare_model(model, layers)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.to(compute)
    masks = nullcontext() if config.data.packing else one_sample_a_row()
    with FakeTensorMode(allow_non_fake_inputs=True), masks, Ledger(ranks_per_node=1) as ledger:
        model.to_empty(device="cpu")
        block, kept = layers.blocks[0], _Kept(ledger)
        names = [f"{layers.block_names[0]}.{name}" for name, _ in block.named_parameters()]
        for name in update.trainable_parameters(names) if trains else []:
            model.get_parameter(name).requires_grad_(True)
        layers.embeddings[0].requires_grad_(True)  # so that the block's input has a gradient
        set_checkpointing(block, kind)
        hooks = [block.register_forward_pre_hook(kept.before), block.register_forward_hook(kept.after)]
        shape = (config.train.micro_batch_size, config.data.sequence_length)
        hidden = model.base_model(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            position_ids=torch.arange(shape[1]).expand(shape),
            use_cache=False,
        ).last_hidden_state
        for hook in hooks:  # older versions of transformers call them again when the block is computed again
            hook.remove()
        ledger.scope = "backward"
        hidden.sum().backward()
    work = ledger.work["backward"]
    return Cost(kept.bytes, work.flops + OPERATIONS_PER_BYTE * work.other_bytes)


@dataclass
class _Kept:
    """Hooks on a block that find how much more is alive after its forward pass than before."""

    ledger: Ledger
    bytes: int = 0

    def before(self, *_: Any) -> None:
        self.bytes = -self.ledger.live_bytes

    def after(self, *_: Any) -> None:
        self.bytes += self.ledger.live_bytes
