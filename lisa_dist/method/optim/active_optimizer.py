"""The optimizer over the parameters that train now: state exists for these only, sharded as their masters are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisa_dist.config import OptimizerConfig
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.method.optim.parameter_groups import ParameterGroups
from lisa_dist.method.optim.spec import in_full, stored_bytes
from lisa_dist.method.updates import OptimizedParam, Update
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.store import GradHook


@dataclass
class Offloaded:
    """The state of a parameter that is frozen, in host memory, until its block returns."""

    step: int  # optimizer steps since it was first added
    tensors: dict[str, torch.Tensor]  # by kind, sharded as before

    @property
    def nbytes(self) -> int:
        """Bytes of this rank."""
        return sum(stored_bytes(tensor) for tensor in self.tensors.values())


@dataclass
class StepInBackward:
    """A step that is made parameter by parameter while the backward pass goes on."""

    rates: Mapping[str, float]  # learning rates by part of the model
    label_tokens: float  # of the global batch, by which gradients are divided
    squares: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank's shard of each mean gradient


class ActiveOptimizer:
    """An optimizer whose set of parameters changes from period to period; which one, its specification says.

    A parameter that is added starts with zero moments and a step count of zero, so a bias correction
    starts anew; a parameter that is released leaves nothing behind. With ``optimizer.state_on_freeze=offload`` its
    state waits in host memory instead and is taken up again, bit for bit. What is stepped is the parameter
    itself, or what the update steps in its place.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        update: Update,
        groups: ParameterGroups | None = None,
        after_step: Callable[[Collection[str]], None] = lambda names: None,
        register_grad_hook: Callable[[str, GradHook], None] = lambda name, hook: None,
    ) -> None:
        """Args:
        config: of the optimizer.
        update: says what is stepped for a parameter.
        groups: which learning rate and weight decay a parameter has; None: those of the blocks.
        after_step: called with the names of the parameters that were stepped.
        register_grad_hook: has a function called as soon as a backward pass has brought a parameter's gradient.

        Raises:
            UserError: a package that the optimizer needs can't be imported.
        """
        self.config = config
        self.spec = optimizer_spec(config)
        self.update = update
        self.groups = groups or ParameterGroups()
        self.after_step = after_step
        self.register_grad_hook = register_grad_hook
        self.trained: dict[str, OptimizedParam] = {}
        self.offloaded: dict[str, Offloaded] = {}
        self._stepper = self.spec.build(self.groups.empty(config))
        self._in_backward: StepInBackward | None = None
        self.before_change: Callable[[], object] = lambda: None  # called before parameters or state change

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: entry.parameter for name, entry in self.trained.items()}

    def add_params(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take parameters in with their offloaded state, or with zero state, which is made at once for checkpoints.

        The order is that of the names, whatever came first: sums over parameters must not depend on history.
        """
        added = {name: self.update.optimized_param(name, parameter) for name, parameter in parameters.items()}
        self.trained = dict(sorted({**self.trained, **added}.items()))
        for name, entry in added.items():
            self._stepper.state[entry.stepped] = self.spec.zero_state(self._stepper, entry.stepped)
            if name in self.offloaded:
                self._restore_state(name)
            if self.config.in_backward:
                self.register_grad_hook(name, self._hook_of(name))
        self._point_at(self.trained)

    def _point_at(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Let the optimizer step what is stepped for ``trained``, each in its group."""
        for group, entries in zip(self._stepper.param_groups, self._grouped(trained)):
            group["params"] = [entry.stepped for entry in entries.values()]

    def _grouped(self, trained: Mapping[str, OptimizedParam]) -> list[dict[str, OptimizedParam]]:
        """Return what of ``trained`` is in each of the optimizer's groups."""
        grouped: list[dict[str, OptimizedParam]] = [{} for _ in self._stepper.param_groups]
        for name, entry in trained.items():
            grouped[self.groups.index_of(name)][name] = entry
        return grouped

    def remove_params(self, names: Iterable[str]) -> None:
        """Drop parameters; their state too, or it goes to host memory."""
        self.before_change()
        for name in names:
            if self.config.state_on_freeze == "offload":
                tensors = {kind: _to_host(tensor) for kind, tensor in self._state_of(name).items()}
                self.offloaded[name] = Offloaded(self._step_count(name), tensors)
            entry = self.trained.pop(name)
            entry.parameter.grad = None
            self._stepper.state.pop(entry.stepped, None)
        self._point_at(self.trained)

    def remove_all(self) -> None:
        """Drop every parameter and all state, that too which waits in host memory."""
        self.before_change()
        self.drop_gradients()
        self.trained, self.offloaded = {}, {}
        self._stepper.state.clear()
        self._point_at(self.trained)

    def step(
        self, rates: Mapping[str, float], divisor: torch.Tensor | None = None, finite: torch.Tensor | None = None
    ) -> None:
        """Make one step and drop the gradients. The host waits for no device where ``steps_on_device``.

        Collective: every rank of the mesh, where the update's transformation of gradients is.

        Args:
            rates: the learning rates by part of the model, as :func:`schedule.learning_rates` returns them.
            divisor: what gradients are to be divided by, a float32 scalar on their device; None: nothing.
            finite: whether the step is made, a scalar there; otherwise parameters, moments and step counts stay.
        """
        if not self.trained:
            return
        if finite is not None and not self.steps_on_device and not bool(finite):
            self.drop_gradients()
            return
        self._step(self.trained, rates, divisor, finite)

    @property
    def steps_on_device(self) -> bool:
        """Whether the optimizer divides gradients and leaves a step out by itself, in the pass that makes the step."""
        return self.spec.scales_gradients and not self.update.needs_finite_gradients

    def _step(
        self,
        trained: Mapping[str, OptimizedParam],
        rates: Mapping[str, float],
        divisor: torch.Tensor | None,
        finite: torch.Tensor | None = None,
    ) -> None:
        self.before_change()
        with torch.no_grad():
            if self.steps_on_device:
                stepper: Any = self._stepper  # which has both attributes by duck typing, as GradScaler knows them
                stepper.grad_scale = divisor
                stepper.found_inf = None if finite is None else (~finite).float()
            elif divisor is not None:
                sums = [entry.parameter.grad for entry in trained.values() if entry.parameter.grad is not None]
                torch._foreach_div_([local_shard(gradient) for gradient in sums], divisor)
            self.update.transform_gradients(trained)
            for entry in trained.values():
                self._turn_moments(entry)
            self._point_at(trained)
            for group in self._stepper.param_groups:
                set_rate(group, rates[group["part"]])
            self._stepper.step()
            if self.steps_on_device:
                stepper.grad_scale = stepper.found_inf = None  # nothing of a step stays
            self._point_at(self.trained)
            for group, entries in zip(self._stepper.param_groups, self._grouped(trained)):
                if entries:  # the same groups on every rank
                    self.update.apply_steps(entries, rates[group["part"]] * group["weight_decay"])
            written = set(map(id, getattr(self._stepper, "copied", ())))  # by the optimizer itself, with the step
            self.after_step([name for name, entry in trained.items() if id(entry.stepped) not in written])
        for entry in trained.values():
            entry.step += entry.stepped.grad is not None
            entry.parameter.grad = entry.stepped.grad = None

    def _turn_moments(self, entry: OptimizedParam) -> None:
        """Bring moments into the basis that the gradient is in now. Collective, every rank, where that has changed."""
        if entry.turn_moment is None:
            return
        for moment in self.spec.moments:
            live = self._stepper.state[entry.stepped][moment.name]
            local_shard(live).copy_(entry.turn_moment(in_full(live), moment.squared))
        entry.turn_moment = None

    @contextmanager
    def stepping_in_backward(self, rates: Mapping[str, float], label_tokens: float) -> Iterator[StepInBackward]:
        """Step each parameter as soon as a backward pass within the context has its gradient, which is then dropped.

        There is no clipping: a global norm is known only when all gradients are. Needs ``optimizer.in_backward``.

        Args:
            rates: the learning rates by part of the model.
            label_tokens: of the global batch; gradients are sums over them.
        """
        self._in_backward = StepInBackward(rates, label_tokens)
        try:
            yield self._in_backward
        finally:
            self._in_backward = None

    def _hook_of(self, name: str) -> Callable[[torch.Tensor], None]:
        def step_at_once(parameter: torch.Tensor) -> None:
            step = self._in_backward
            if step is None or parameter.grad is None:
                return  # a dry run or a probe
            gradient = local_shard(parameter.grad)
            step.squares[name] = (torch.linalg.vector_norm(gradient, dtype=torch.float32) / step.label_tokens).square()
            divisor = gradient.new_full((), step.label_tokens, dtype=torch.float32)
            self._step({name: self.trained[name]}, step.rates, divisor)

        return step_at_once

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients that there are, by parameter name; they may lie at what is stepped instead of it."""
        held = {name: (entry.parameter.grad, entry.stepped.grad) for name, entry in self.trained.items()}
        return {name: found[0] for name, pair in held.items() if (found := [grad for grad in pair if grad is not None])}

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for entry in self.trained.values():
            entry.parameter.grad = entry.stepped.grad = None

    def moment_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state's tensors by ``<parameter name>.<kind>``: the live tensors, copies of packed ones.

        Kinds are the moments of the specification and those that the update keeps beside them. State that waits in host
        memory is among them.
        """
        return {name: in_full(tensor) for name, tensor in self._live_tensors().items()}

    def load_moments(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in what :meth:`moment_tensors` returned, filled since: only copies are new to the state."""
        for name, live in self._live_tensors().items():
            if tensors[name] is not live:
                local_shard(live).copy_(local_shard(tensors[name]))

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        found = {f"{name}.{kind}": tensor for name in self.trained for kind, tensor in self._state_of(name).items()}
        for name, waiting in self.offloaded.items():
            found |= {f"{name}.{kind}": tensor for kind, tensor in waiting.tensors.items()}
        return found

    def _state_of(self, name: str) -> dict[str, torch.Tensor]:
        entry = self.trained[name]
        return self._moments_of(self._stepper.state[entry.stepped]) | entry.extra

    def _moments_of(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {moment.name: state[moment.name] for moment in self.spec.moments}

    def step_counts(self) -> dict[str, int]:
        """Return how many steps each parameter with state has made since it was added."""
        counts = {name: self._step_count(name) for name in self.trained}
        return counts | {name: waiting.step for name, waiting in self.offloaded.items()}

    def set_step_counts(self, counts: Mapping[str, int]) -> None:
        """Restore what :meth:`step_counts` returned."""
        for name, waiting in self.offloaded.items():
            waiting.step = counts[name]
        for name in self.trained:
            self._set_step_count(name, counts[name])

    def _step_count(self, name: str) -> int:
        """Return how many steps a parameter has made; the device counts them where it leaves steps out by itself."""
        entry = self.trained[name]
        counted = self._stepper.state[entry.stepped].get("step") if self.steps_on_device else None
        return entry.step if counted is None else int(counted)

    def _set_step_count(self, name: str, count: int) -> None:
        entry = self.trained[name]
        entry.step = count
        state = self._stepper.state[entry.stepped]
        if "step" in state:
            state["step"].fill_(count)

    def allocate_offloaded(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make room in host memory for the state of frozen parameters, which a checkpoint will fill."""
        for name, parameter in parameters.items():
            entry = self.update.optimized_param(name, parameter)
            target = entry.stepped.detach().float()  # as it is where it trains, not as it is stored now
            tensors = self._moments_of(self.spec.zero_state(self._stepper, target)) | entry.extra
            self.offloaded[name] = Offloaded(0, {kind: _to_host(tensor) for kind, tensor in tensors.items()})

    def _restore_state(self, name: str) -> None:
        """Bring a parameter's state back from host memory."""
        waiting = self.offloaded.pop(name)
        for kind, tensor in self._state_of(name).items():
            local_shard(tensor).copy_(local_shard(waiting.tensors[kind]))
        self._set_step_count(name, waiting.step)

    def state_bytes(self) -> int:
        """Return this rank's bytes of moments and of what the update keeps beside them, for what trains now."""
        return sum(stored_bytes(tensor) for name in self.trained for tensor in self._state_of(name).values())

    def offloaded_bytes(self) -> int:
        """Return this rank's bytes of state that waits in host memory."""
        return sum(waiting.nbytes for waiting in self.offloaded.values())


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a group; a step that is compiled holds it as a tensor, which must stay the same one."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor whose shard is in host memory, pinned where it comes from a GPU.

    The operators of DTensor leave a shard where they put it; ``DTensor.from_local`` would take it to the mesh's device.
    """
    shard = local_shard(tensor)
    if not shard.is_cuda or is_traceable_wrapper_subclass(shard):
        return tensor.cpu()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    local_shard(host).copy_(shard)
    return host
