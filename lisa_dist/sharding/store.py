"""The parameter store: where the weights of a model lie, and how they come to where they are used.

The switch, the optimizer, checkpoints and the planner speak to this interface; how weights are laid out is known to
its implementations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lisa_dist.models.layer_map import EMBEDDINGS, LayerMap, block_of
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.waiting_states import StatesOnDevice, WaitingStates

GradHook = Callable[[Tensor], None]


class ParameterStore(Protocol):
    """The weights of a model, of which some train.

    A tensor that a store hands out has the shape of the whole. Where it is sharded it is a DTensor that holds this
    rank's rows, otherwise a plain tensor. Nothing is collective unless it says so.
    """

    module: nn.Module  # forward passes are collective where weights are sharded, backward passes on several ranks
    layers: LayerMap

    @property
    def names(self) -> Collection[str]:
        """The names of all parameters, tied ones once."""
        ...

    def parameters_of(self, part: str) -> list[str]:
        """Return the parameter names of a part: ``block:<i>``, ``embeddings``, ``norm`` or ``head``."""
        return [name for name in self.names if self.layers.group_of(name) == part]

    def block_parameters(self, block: int) -> list[str]:
        """Return the names of all parameters of a block."""
        return self.parameters_of(f"block:{block}")

    def lowest_reached(self) -> int:
        """Return the lowest block that a backward pass reaches, by what trains; their number where it reaches none."""
        groups = {self.layers.group_of(name) for name in self.names if self.parameter(name).requires_grad}
        blocks = [block for group in groups if (block := block_of(group)) is not None]
        return 0 if EMBEDDINGS in groups else min(blocks, default=len(self.layers.blocks))

    def parameter(self, name: str) -> nn.Parameter:
        """Return what the model computes with, as it is stored; ``requires_grad`` says whether it trains."""
        ...

    def master(self, name: str) -> nn.Parameter:
        """Return what the optimizer steps and a checkpoint holds: the exact value, and the gradient after a backward.

        It is the parameter itself where nothing lies beside it.
        """
        ...

    def like_master(self, name: str) -> nn.Parameter:
        """Return what has the shape and layout that a frozen parameter's master would have; its values say nothing."""
        return self.parameter(name)

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        """Allocate every parameter in the dtype of its state, and every buffer, all uninitialised.

        Args:
            trained: the names of the parameters that train from the start; all others are frozen.
            device: where weights lie that are not kept in host memory.
        """
        ...

    def make_masters(self, trained: Iterable[str]) -> None:
        """Make the masters of what trains, now that the allocated parameters have their values."""
        ...

    def set_trainable(self, names: Iterable[str], trained: bool, seed: int = 0, period: int = 0) -> None:
        """Freeze or thaw parameters: where and in which dtype they are stored, and whether they have gradients.

        Collective, every rank, where masters are split among replicas. Gradients of what is frozen must be dropped.

        Args:
            names: the parameters that begin or cease to train; buffers and all other parameters are left alone.
            trained: True stores them in ``precision.active``, False in ``precision.frozen``, but for adapters.
            seed: the run's; keys the noise of stochastic rounding (``precision.on_freeze``).
            period: keys it too.
        """
        ...

    def also_trained(self, names: Iterable[str], hook: GradHook) -> AbstractContextManager[None]:
        """Let frozen parameters have gradients too while the context lasts, in the dtype they are stored in.

        Args:
            names: of what may be frozen or train. Name all of a block that could train: what is gathered together must
                have gradients of one dtype.
            hook: is called with each of these parameters as soon as its gradient is summed over the replicas, and may
                drop it; else gradients stay at the parameters.
        """
        ...

    def masters_to_params(self, names: Iterable[str]) -> None:
        """Put masters that were stepped, rounded to nearest, into what the model computes with.

        Collective, every rank, where masters are split among replicas.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return every master and persistent buffer by name, tied ones once: live tensors, no copies."""
        tensors: dict[str, Tensor] = self.module.state_dict(keep_vars=True)
        first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
        return {
            name: (self.master(name) if name in self.names else tensor).detach()
            for name, tensor in tensors.items()
            if first_names[id(tensor)] == name
        }

    def thaw_replaces(self, name: str) -> bool:
        """Whether a thaw gives a frozen parameter another tensor, so that the one it has now is not written again.

        It does where the dtype changes.
        """
        return self._storage_dtype(name, trained=True) != self._storage_dtype(name, trained=False)

    def _storage_dtype(self, name: str, trained: bool) -> torch.dtype:
        """Return the dtype in which a parameter is stored that trains, or is frozen."""
        ...

    def on_host(self, name: str) -> bool:
        """Whether a parameter as it is stored now, with its gradient, lies in host memory."""
        ...

    @property
    def link_bytes(self) -> int:
        """Bytes of weights that the store itself has copied from host memory to the device since the start."""
        return 0

    def link_bytes_ahead(self) -> int:
        """Return how many of these bytes are there for the next step, which need not be copied in it."""
        return 0

    @property
    def link_misses(self) -> int:
        """How often, since the start, weights from host memory were not on their way when they were used."""
        return 0

    def frozen_block_bytes(self) -> dict[int, int]:
        """Return the bytes of each block that may lie in host memory or on the device, where there is a choice."""
        return {}

    def keep_on_device(self, blocks: Iterable[int]) -> None:
        """Have these of the blocks of :meth:`frozen_block_bytes` lie on the device, the others in host memory."""
        assert not list(blocks), "no block has a choice"

    def recomputes(self, block: int) -> bool:
        """Whether the store itself has a block computed again in the backward pass; then that keeps its input alone."""
        return False

    def expect_visits(self) -> None:
        """Say that the blocks are visited upwards, and back to the lowest that gradients reach."""
        return

    def visit(self, block: int) -> AbstractContextManager[Callable[..., Any]]:
        """Have a block's weights where they are used while the context lasts; gives its forward pass, without more."""
        return nullcontext(self.layers.blocks[block].forward)

    def waiting_states(self) -> WaitingStates:
        """Return where the inputs of blocks wait in a step whose micro-batches pass one block at a time together."""
        return StatesOnDevice()

    def register_grad_hook(self, name: str, hook: GradHook) -> None:
        """Have ``hook(master)`` called as soon as a backward pass has brought a gradient, summed over all ranks.

        It holds until the parameter is frozen.
        """
        ...

    def defer_reduction(self, deferred: bool) -> None:
        """Say whether more backward passes of the same step follow the coming one, which may reduce its gradients too.

        A store leaves them unreduced where that costs no memory, or where ``parallel.defer_reduction`` asks for it.
        """
        ...

    def transient_bytes(self) -> int:
        """Return the most bytes of this rank's device that gathers and reductions take for a while."""
        ...


def allocate_buffers(model: nn.Module, device: torch.device) -> None:
    """Allocate every buffer that is still on ``meta``, uninitialised: no store shards or moves them."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)


def persistent_bytes(store: ParameterStore) -> dict[str, int]:
    """Count this rank's bytes of parameters and gradients, by kind, as they lie in memory (padding left out).

    ``masters`` are named only where some lie apart from the parameters.
    """
    counted = {"frozen_parameters": 0, "active_parameters": 0, "gradients": 0}
    for name in store.names:
        parameter, master = store.parameter(name), store.master(name)
        kind = "active_parameters" if parameter.requires_grad else "frozen_parameters"
        counted[kind] += local_shard(parameter.detach()).nbytes
        if master is not parameter:
            counted["masters"] = counted.get("masters", 0) + local_shard(master.detach()).nbytes
        if master.grad is not None:
            counted["gradients"] += local_shard(master.grad).nbytes
    return counted
