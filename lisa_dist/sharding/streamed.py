"""The store of one rank whose frozen blocks lie in host memory and come to the device one after the other.

What trains, and what is outside the blocks, lies on the device as in the resident store, with the same numbers. The
frozen parameters of a block share one buffer in host memory, which is copied whole into one of a few slots while the
block before it computes. Nothing of a frozen block outlives its visit but its input: the backward pass fetches the
block again and computes it again, so that no saved tensor points into a slot that holds another block by then (the
way of L2L, arXiv 2002.05645, and MegaTrain; gradients through such slots under plain checkpointing would be wrong
without a word).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lisa_dist.config import PrecisionConfig, UserError
from lisa_dist.models.layer_map import LayerMap, block_of
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_bytes
from lisa_dist.sharding.link import Slots, link_to
from lisa_dist.sharding.recomputed import recompute
from lisa_dist.sharding.resident import ResidentStore
from lisa_dist.sharding.waiting_states import HostStates, StatesOnHost, WaitingStates
from lisa_dist.telemetry.memory import free_host_bytes

ALIGNMENT = 256  # bytes between the starts of two parameters in a buffer, as CUDA's allocator aligns tensors


@dataclass(frozen=True)
class Extent:
    """Where a parameter lies in the buffer of its block."""

    start: int  # bytes
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + self.shape.numel() * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """Return the parameter's part of a buffer."""
        return buffer[self.start : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class HostBlock:
    """What streams of a block: a buffer in host memory, and where in it each parameter lies, by name."""

    buffer: Tensor
    extents: dict[str, Extent]


class StreamedStore(ResidentStore):
    """A model whose frozen blocks are brought to the device when they are used."""

    def __init__(
        self,
        module: nn.Module,
        layers: LayerMap,
        mesh: DeviceMesh,
        precision: PrecisionConfig,
        keeps_precision: Callable[[str], bool],
        ahead: int,
        host_states: HostStates | None = None,
    ) -> None:
        """Take in a model on ``meta``, and the forward passes of its blocks. Nothing is allocated.

        Args:
            module: the model.
            layers: its layers.
            mesh: of one rank.
            precision: storage and arithmetic; frozen parameters are stored in the dtype of the arithmetic.
            keeps_precision: whether a frozen parameter is stored as what trains; it stays on the device.
            ahead: how many blocks are on their way while one computes; each takes a slot more.
            host_states: the inputs of blocks that wait in host memory; None: they wait on the device.

        Raises:
            UserError: blocks share parameters.
        """
        super().__init__(module, layers, mesh, precision, keeps_precision)
        self._ahead, self._host_states = ahead, host_states
        self._hosted: dict[int, HostBlock] = {}  # the blocks that stream
        self._kept: set[int] = set()  # blocks that stay on the device although they are frozen
        self._names = [self.block_parameters(index) for index in range(len(layers.blocks))]
        self._check_own_parameters()
        self._connect(torch.device("meta"))
        self._forwards = [block.forward for block in layers.blocks]
        for index, block in enumerate(layers.blocks):
            block.forward = partial(self._run, index, block.forward)

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        """Allocate what stays on the device, and host memory for what does not; on ``meta`` neither.

        Where a run goes back to a checkpoint, what it had is given up first, and its pinned memory serves again.

        Raises:
            UserError: there is not as much host memory.
        """
        trained = set(trained)
        if device == self.device:
            self.slots.forget()
        else:
            if device.type != "meta":
                streaming = [names for block, names in enumerate(self._names) if block not in self._kept]
                frozen = ([name for name in names if name not in trained] for names in streaming)
                weights = sum(self._layout(filter(self._may_stream, names))[1] for names in frozen)
                check_host_memory(weights, 0 if self._host_states is None else self._host_states.total)
            self._connect(device)
        self._hosted.clear()
        super().allocate(trained, device)
        for block in range(len(self._names)):
            self._pack(block)

    def set_trainable(self, names: Iterable[str], trained: bool, seed: int = 0, period: int = 0) -> None:
        """Give each parameter the tensors of its new state, and its block a buffer of what is frozen of it then.

        The old buffer is not written again: a checkpoint may still read it.
        """
        names = list(names)
        blocks = dict.fromkeys(self._block_of(name) for name in names)
        self.slots.forget()
        for name in names:
            if self.on_host(name):
                self._put(name, self.parameter(name).detach().to(self.device, copy=True), trained=False)
        super().set_trainable(names, trained, seed, period)
        for block in blocks:
            if block is not None:
                self._pack(block)

    def thaw_replaces(self, name: str) -> bool:
        """Whether the parameter lies in host memory, or its dtype changes."""
        return self.on_host(name) or super().thaw_replaces(name)

    def frozen_block_bytes(self) -> dict[int, int]:
        """Return the bytes of each block that streams, or would if it were not kept on the device."""
        found = {}
        for block in range(len(self._names)):
            if names := self._frozen_in(block):
                found[block] = sum(self.parameter(name).nbytes for name in names)
        return found

    def keep_on_device(self, blocks: Iterable[int]) -> None:
        """Have these blocks stay on the device while they are frozen, until this is called again."""
        before, self._kept = self._kept, set(blocks)
        moved = before ^ self._kept
        if moved:
            self.slots.forget()
        for block in sorted(moved, key=self._kept.__contains__):  # those that leave first
            self._pack(block)

    def on_host(self, name: str) -> bool:
        """Whether the parameter lies in its block's buffer."""
        block = self._block_of(name)
        return block in self._hosted and name in self._hosted[block].extents

    @property
    def link_bytes(self) -> int:
        """Bytes that were copied to the device since the start."""
        return self.link.copied_bytes

    def link_bytes_ahead(self) -> int:
        """Return the bytes that the slots hold."""
        return self.slots.held_bytes()

    @property
    def link_misses(self) -> int:
        """How often a block was not on its way when it was used, since the start: once after each switch."""
        return self.slots.misses

    def recomputes(self, block: int) -> bool:
        """Whether the block is fetched and computed again in the backward pass."""
        return block in self._hosted

    def expect_visits(self) -> None:
        """Say that the blocks are visited upwards, and back to the lowest that gradients reach."""
        streaming = sorted(self._hosted)
        lowest = self.lowest_reached() if torch.is_grad_enabled() else len(self.layers.blocks)
        self.slots.expect([*streaming, *(block for block in reversed(streaming) if block >= lowest)])

    @contextmanager
    def visit(self, block: int) -> Iterator[Callable[..., Any]]:
        """Have a block's weights on the device while the context lasts; gives its forward pass."""
        with self._visit(block, []) if block in self._hosted else nullcontext():
            yield self._forwards[block]

    def waiting_states(self) -> WaitingStates:
        """Return where the inputs of blocks wait in a step whose micro-batches pass one block at a time together."""
        return (
            super().waiting_states() if self._host_states is None else StatesOnHost(self.link, self._host_states.each)
        )

    def transient_bytes(self) -> int:
        """Return the bytes of the slots, and of the gradients that a block that streams has at a time."""
        gradients = [sum(self.parameter(name).nbytes for name in self._trained_in(block)) for block in self._hosted]
        return self.slots.count * self.slots.size + max([super().transient_bytes(), *gradients])

    def _connect(self, device: torch.device) -> None:
        """Have a link to ``device``, and slots there, which are allocated when they are used."""
        self.device, self.link = device, link_to(device)
        # Any block may stream one day, whatever trains now.
        size = max(self._layout(filter(self._may_stream, names))[1] for names in self._names)
        count = min(1 + self._ahead, len(self._names))
        self.slots = Slots(self.link, count, size, device, lambda block: self._hosted[block].buffer)

    def _trained_in(self, block: int) -> list[str]:
        return [name for name in self._names[block] if self.parameter(name).requires_grad]

    def _block_of(self, name: str) -> int | None:
        return block_of(self.layers.group_of(name))

    def _check_own_parameters(self) -> None:
        for index, block in enumerate(self.layers.blocks):
            inside = set(block.modules())
            for name in self._names[index]:
                if not all(owner in inside for owner, _ in self._owners[name]):
                    raise UserError(
                        f"parallel.offload=frozen: {name} is shared with what is outside its block, which can't be "
                        "kept in host memory on one rank; set parallel.offload=none"
                    )

    def _may_stream(self, name: str) -> bool:
        return self._block_of(name) is not None and not self.keeps_precision(name)

    def _place(self, name: str, trained: bool, device: torch.device) -> torch.device:
        stays = trained or not self._may_stream(name) or self._block_of(name) in self._kept
        return device if stays else torch.device("meta")  # until it is packed

    def _layout(self, names: Iterable[str]) -> tuple[dict[str, Extent], int]:
        """Return where frozen parameters lie in their block's buffer, and its bytes."""
        extents, end = {}, 0
        for name in names:
            extents[name] = Extent(end, self.parameter(name).shape, self._storage_dtype(name, trained=False))
            end = -(-extents[name].end // ALIGNMENT) * ALIGNMENT
        return extents, end

    def _frozen_in(self, block: int) -> list[str]:
        """Return what streams of a block, or would if it were not kept on the device."""
        names = self._names[block]
        return [name for name in names if self._may_stream(name) and not self.parameter(name).requires_grad]

    def _pack(self, block: int) -> None:
        """Give what is frozen of a block a new buffer in host memory, in the order of its parameters, or the device."""
        before = self._hosted.pop(block, None)
        if block in self._kept:
            for name in before.extents if before is not None else ():
                if not self.parameter(name).requires_grad:
                    self._put(name, self.parameter(name).detach().to(self.device, copy=True), trained=False)
            return
        extents, size = self._layout(self._frozen_in(block))
        if not extents:
            return
        hosted = self._hosted[block] = HostBlock(self.link.host_buffer(size), extents)
        for name, extent in extents.items():
            old, new = self.parameter(name).detach(), extent.of(hosted.buffer)
            if old.device.type != "meta":
                new.copy_(old)
            self._put(name, new, trained=False)

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block's forward pass, with its weights fetched where they stream."""
        if index not in self._hosted:
            return forward(*args, **kwargs)
        if index == min(self._hosted):
            self.expect_visits()
        names = self._trained_in(index)
        trained = [self.parameter(name) for name in names]
        return recompute(forward, args, kwargs, trained, partial(self._visit, index, names), self.device)

    @contextmanager
    def _visit(self, block: int, trained: list[str]) -> Iterator[list[Tensor]]:
        """Have a block's modules hold their frozen weights in a slot of the device; gives what is ``trained`` of it."""
        slot = self.slots.enter(block)
        there = {}
        for name, extent in self._hosted[block].extents.items():
            # Each block's own parameters: blocks differ in more than weights. The version of a view is the slot's, so
            # that autograd would refuse what was saved of another visit.
            has_gradient = torch.is_grad_enabled() and self.parameter(name).requires_grad
            there[name] = nn.Parameter(extent.of(slot.buffer), requires_grad=has_gradient)
        self._hand_out(there)
        try:
            yield [there.get(name, self.parameter(name)) for name in trained]
        finally:
            self._hand_out({name: self.parameter(name) for name in there})
            self.slots.leave(slot)

    def _hand_out(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            for owner, key in self._owners[name]:
                owner._parameters[key] = parameter


def check_host_memory(weights: int, states: int) -> None:
    """Raise :class:`UserError` where what streams does not fit into what is free of host memory; not in a plan."""
    free = None if distributed.is_simulated() else free_host_bytes()
    if free is not None and weights + states > free:
        inputs = f", and the inputs of blocks {format_bytes(states)} (parallel.offload_activations)" if states else ""
        less = "parallel.offload_activations=false, " if states else ""
        raise UserError(
            f"parallel.offload: the frozen blocks that stream need {format_bytes(weights)} of host memory{inputs}, and "
            f"{format_bytes(free)} are free; take {less}a machine with more, more ranks, parallel.offload=auto, or "
            "model.quantization=int8 with update=lora"
        )
