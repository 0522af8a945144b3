"""A second parameter store: one rank, every weight whole, no FSDP2 and no DTensor. It shows that the interface is one.

What a parameter is stored as is what the model computes with; where its exact value has another dtype, that lies beside
it as the master.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lisa_dist.config import ParallelConfig, PrecisionConfig
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.sharding.rounding import convert, dtype_of, rounding_seed
from lisa_dist.sharding.store import ParameterStore, allocate_buffers
from lisa_dist.sharding.wrapping_policy import storage_dtype


class ResidentStore(ParameterStore):
    """A model whose parameters are plain tensors on one device."""

    def __init__(
        self,
        module: nn.Module,
        layers: LayerMap,
        mesh: DeviceMesh,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        keeps_precision: Callable[[str], bool] = lambda name: False,
    ) -> None:
        assert mesh.size() == 1
        self.module, self.layers, self.precision = module, layers, precision
        self.keeps_precision = keeps_precision
        self._parameters = dict(module.named_parameters())
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self._parameters}
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    self._owners[names[id(parameter)]].append((owner, key))
        self._masters: dict[str, nn.Parameter] = {}
        self._receives_gradients = True

    @property
    def names(self) -> KeysView[str]:
        return self._parameters.keys()

    def parameter(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def master(self, name: str) -> nn.Parameter:
        return self._masters.get(name, self._parameters[name])

    def allocate(self, trained: Iterable[str], device: torch.device) -> None:
        active = set(trained)
        self._masters.clear()
        for name, old in list(self._parameters.items()):
            self._put(
                name, torch.empty(old.shape, dtype=self._dtype(name, name in active), device=device), name in active
            )
        allocate_buffers(self.module, device)

    def make_masters(self, trained: Iterable[str]) -> None:
        for name, parameter in list(self._parameters.items()):
            self._put_exact(name, parameter.detach(), parameter.requires_grad)

    def set_trainable(self, names: Iterable[str], trained: bool, seed: int = 0, period: int = 0) -> None:
        stochastic = not trained and self.precision.on_freeze == "stochastic"
        for name in names:
            exact = self.master(name).detach()
            self._masters.pop(name, None)
            noise = rounding_seed(seed, period, name, 0) if stochastic else None
            self._put_exact(name, convert(exact, self._dtype(name, trained), noise), trained)

    @contextmanager
    def also_trained(self, names: Iterable[str]) -> Iterator[None]:
        frozen = [self._parameters[name] for name in names if not self._parameters[name].requires_grad]
        self._receives_gradients = False
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
        for parameter in frozen:
            parameter.requires_grad_(False).grad = None
        self._receives_gradients = True

    def masters_to_params(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._masters:
                self._parameters[name].detach().copy_(self._masters[name])

    def thaw_replaces(self, name: str) -> bool:
        return self._dtype(name, trained=True) != self._dtype(name, trained=False)

    def on_host(self, name: str) -> bool:
        return False

    def defer_reduction(self, deferred: bool) -> None:
        pass

    def transient_bytes(self) -> int:
        return 0

    def _dtype(self, name: str, trained: bool) -> torch.dtype:
        return storage_dtype(self.precision, trained or self.keeps_precision(name))

    def _put_exact(self, name: str, exact: Tensor, trained: bool) -> None:
        compute = dtype_of(self.precision.compute)
        self._put(name, exact.to(compute), trained)
        if exact.dtype != compute:
            self._masters[name] = nn.Parameter(exact, requires_grad=trained)
        if trained and exact.dtype != compute:
            self._register_grad_hook(name)

    def _register_grad_hook(self, name: str) -> None:
        def receive(parameter: Tensor) -> None:
            if not self._receives_gradients or parameter.grad is None:
                return
            master = self._masters[name]
            master.grad = parameter.grad if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

        self._parameters[name].grad_dtype = self._masters[name].dtype
        self._parameters[name].register_post_accumulate_grad_hook(receive)

    def _put(self, name: str, tensor: Tensor, trained: bool) -> None:
        self._parameters[name] = nn.Parameter(tensor, requires_grad=trained)
        for owner, key in self._owners[name]:
            owner._parameters[key] = self._parameters[name]
