"""The store of one rank, and of replicas of one rank each: every weight lies whole where it is used.

What the model computes with is a plain tensor in the compute dtype. The exact value of what trains, where its dtype is
another one, lies beside it as the master. Embeddings need no copy: the rows that are looked up are cast instead.
Nothing is gathered; between replicas the gradients of what trains travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lisa_dist.config import PrecisionConfig
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.runtime import distributed
from lisa_dist.sharding.replicas import GradientSums
from lisa_dist.sharding.rounding import convert, dtype_of, rounding_seed
from lisa_dist.sharding.store import GradHook, ParameterStore, allocate_buffers
from lisa_dist.sharding.wrapping_policy import storage_dtype

WHOLE = 0  # the index of the only shard: keys the rounding noise, so replicas stay equal


class ResidentStore(ParameterStore):
    """A model whose parameters are plain tensors on this rank's device."""

    def __init__(
        self,
        module: nn.Module,
        layers: LayerMap,
        mesh: DeviceMesh,
        precision: PrecisionConfig,
        keeps_precision: Callable[[str], bool],
    ) -> None:
        """Take in a model on ``meta``. Nothing is allocated.

        Args:
            module: the model.
            layers: its layers.
            mesh: ``shard`` of one rank, or ``replicate`` x ``shard``.
            precision: storage and arithmetic; frozen parameters are stored in the dtype of the arithmetic.
            keeps_precision: whether a frozen parameter is stored as what trains.
        """
        self.module, self.layers, self.precision = module, layers, precision
        self.keeps_precision = keeps_precision
        self._parameters = dict(module.named_parameters())  # tied ones once
        self._masters: dict[str, nn.Parameter] = {}  # by name, where the parameter is a copy in another dtype
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._parameters}
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    self._owners[names[id(parameter)]].append((owner, key))
        # Rows are cast behind a forward that only looks them up. One that goes on with them, as Gemma's, which scales
        # them, has to do so in the dtype of the arithmetic.
        self._looked_up = {
            name
            for name, owners in self._owners.items()
            if all(type(owner).forward is nn.Embedding.forward for owner, _ in owners)
        }
        for name in self._looked_up:
            for owner, _ in self._owners[name]:
                owner.register_forward_hook(self._cast_rows)
        group = mesh.get_group("replicate") if mesh.ndim > 1 else None
        self._sums = None if group is None else GradientSums(group, dtype_of(precision.reduce))
        self._grad_hooks: dict[str, GradHook] = {}
        self._probe_hooks: dict[str, GradHook] | None = None  # while a probe looks at gradients, which stay in place
        self._deferred = False
        # Of a backward pass whose gradients are summed over the replicas, which need not bring them in one order, nor
        # all of them: an expert that was sent no token has none.
        self._awaited: deque[str] = deque()  # whose sums are still to be begun, in the order that replicas share
        self._arrived: set[str] = set()

    @property
    def names(self) -> KeysView[str]:
        """The names of all parameters."""
        return self._parameters.keys()

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of the module."""
        return self._parameters[name]

    def master(self, name: str) -> nn.Parameter:
        """Return what lies beside the parameter where something does, else the parameter."""
        return self._masters.get(name, self._parameters[name])

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        """Allocate every parameter and buffer; masters wait for the values."""
        active = set(trained)
        self._masters.clear()
        for name in self.names:
            dtype = self._storage_dtype(name, name in active)
            place = self._place(name, name in active, device)
            self._put(name, torch.empty(self.parameter(name).shape, dtype=dtype, device=place), name in active)
        allocate_buffers(self.module, device)

    def make_masters(self, trained: Iterable[str]) -> None:
        """Put beside each parameter that is stored in another dtype than it is used in (frozen adapters too) a copy."""
        for name in self.names:
            parameter = self.parameter(name)
            self._put_exact(name, parameter.detach(), parameter.requires_grad)

    def set_trainable(self, names: Iterable[str], trained: bool, seed: int = 0, period: int = 0) -> None:
        """Give each parameter the tensors of its new state."""
        stochastic = not trained and self.precision.on_freeze == "stochastic"
        for name in names:
            exact = self.master(name).detach()
            self._masters.pop(name, None)
            noise = rounding_seed(seed, period, name, WHOLE) if stochastic else None
            self._put_exact(name, convert(exact, self._storage_dtype(name, trained), noise), trained)

    @contextmanager
    def also_trained(self, names: Iterable[str], hook: GradHook) -> Iterator[None]:
        """Let frozen parameters have gradients too while the context lasts."""
        self._probe_hooks = dict.fromkeys(names, hook)
        frozen = {name: self.parameter(name) for name in self._probe_hooks if not self.parameter(name).requires_grad}
        for parameter in frozen.values():
            parameter.requires_grad_(True)
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, name))
            for name, parameter in frozen.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen.values():
                parameter.requires_grad_(False).grad = None
            self._probe_hooks = None

    def masters_to_params(self, names: Iterable[str]) -> None:
        """Round the masters into the copies that the model computes with."""
        apart = [name for name in names if name in self._masters]
        if apart:
            copies = [self.parameter(name).detach() for name in apart]
            torch._foreach_copy_(copies, [self.master(name).detach() for name in apart])

    def on_host(self, name: str) -> bool:
        """No parameter lies in host memory beside its device."""
        return False

    def register_grad_hook(self, name: str, hook: GradHook) -> None:
        """Have ``hook`` called with the master."""
        self._grad_hooks[name] = hook

    def defer_reduction(self, deferred: bool) -> None:
        """Have replicas sum a step's gradients once, after its last backward pass: until then they cost no memory."""
        self._deferred = deferred

    def transient_bytes(self) -> int:
        """Return the bytes of the largest parameter's gradient as it is computed."""
        return max(self.parameter(name).nbytes for name in self.names)

    def _storage_dtype(self, name: str, trained: bool) -> torch.dtype:
        dtype = self.parameter(name).dtype
        if not dtype.is_floating_point:  # the codes of a quantised weight
            return dtype
        return storage_dtype(self.precision, trained or self.keeps_precision(name))

    def _place(self, name: str, trained: bool, device: torch.device) -> torch.device:
        """Return where a parameter is allocated."""
        return device

    def _put_exact(self, name: str, exact: Tensor, trained: bool) -> None:
        """Make ``exact`` the value of a parameter, by a copy where the model computes in another dtype."""
        used = exact
        if exact.is_floating_point() and name not in self._looked_up:
            used = exact.to(dtype_of(self.precision.compute))
        self._put(name, used, trained)
        if used is not exact:
            master: Any = nn.Parameter(exact, requires_grad=trained)
            master.compute_copy = self.parameter(name).detach()  # for an optimizer that writes both in one pass
            self._masters[name] = master
            if trained:  # a gradient that is summed in the master's dtype, as the head's, is not rounded on its way
                parameter: Any = self.parameter(name)
                parameter.grad_dtype = exact.dtype
                if exact.is_cuda or distributed.is_simulated():
                    parameter.take_gradient = partial(self._give_gradient, name)

    def _cast_rows(self, module: nn.Module, args: Any, rows: Tensor) -> Tensor:
        return rows.to(dtype_of(self.precision.compute))

    def _put(self, name: str, tensor: Tensor, trained: bool) -> None:
        parameter = self._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
        for owner, key in self._owners[name]:
            owner._parameters[key] = parameter
        self._grad_hooks.pop(name, None)
        if trained:
            parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, name))

    def _take_gradient(self, name: str, parameter: Tensor) -> None:
        """Add a gradient, as soon as a backward pass has it, to its master's, in the master's dtype."""
        if self._probe_hooks is not None:
            if name in self._probe_hooks:
                self._sum_over_replicas(name, self.parameter, self._probe_hooks)
            return
        gradient, master = parameter.grad, self.master(name)
        assert gradient is not None
        if master is not parameter:
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None
        if self._sums is None or not self._deferred:
            self._sum_over_replicas(name, self.master, self._grad_hooks)

    def _give_gradient(self, name: str) -> Tensor | None:
        """Return the sum of a parameter's gradients so far, to which the next one, when it comes, is added already."""
        master = self.master(name)
        gradient, master.grad = master.grad, None
        return gradient

    def _sum_over_replicas(
        self, arrived: str, holder: Callable[[str], nn.Parameter], hooks: dict[str, GradHook]
    ) -> None:
        """Begin the sums that are next, up to a gradient that has not come; the backward pass ends with all others.

        Args:
            arrived: whose gradient has come.
            holder: gives, by its name, what has the gradient of a parameter.
            hooks: by name, what is called with that once the sum is there.
        """
        sums = self._sums
        if sums is None:
            if arrived in hooks:
                hooks[arrived](holder(arrived))
            return

        def begin_next() -> None:
            name = self._awaited.popleft()
            held, hook = holder(name), hooks.get(name)
            if held.grad is None:
                held.grad = torch.zeros_like(held)
            sums.begin(held.grad, None if hook is None else partial(hook, held))

        def end() -> None:
            while self._awaited:
                begin_next()
            sums.end()
            self._arrived.clear()

        if not self._arrived:
            awaited = self.names if self._probe_hooks is None else self._probe_hooks
            self._awaited.extend(name for name in reversed(list(awaited)) if self.parameter(name).requires_grad)
            # As FSDP2 and DDP have something done at the end of a backward pass; it has no public name.
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(end)
        self._arrived.add(arrived)
        while self._awaited and self._awaited[0] in self._arrived:
            begin_next()
