"""AdamW over the parameters that train now: state exists for these only, as DTensors on the same mesh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisa_dist.config import OptimizerConfig
from lisa_dist.method.optim import eight_bit
from lisa_dist.method.optim.eight_bit import stored_bytes
from lisa_dist.method.updates import OptimizedParam, Update
from lisa_dist.runtime.distributed import local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")


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

    lr: float
    label_tokens: float  # of the global batch, by which gradients are divided
    squares: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank's shard of each gradient


class ActiveOptimizer:
    """AdamW (arXiv 1711.05101) whose set of parameters changes from period to period.

    A parameter that is added starts with zero moments and a step count of zero, so its bias correction
    starts anew; a parameter that is released leaves nothing behind. With ``optimizer.state_on_freeze=offload`` its
    state waits in host memory instead and is taken up again, bit for bit. What AdamW steps is the parameter
    itself, or the update's stand-in for it.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        update: Update,
        undecayed: Collection[str] = (),
        after_step: Callable[[Collection[str]], None] = lambda names: None,
    ) -> None:
        """Args:
        config: of the optimizer.
        update: says what is stepped for a parameter.
        undecayed: names of the parameters that weight decay leaves out.
        after_step: called with the names of the parameters that were stepped.
        """
        self.config = config
        self.update = update
        self.undecayed = undecayed
        self.after_step = after_step
        self.trained: dict[str, OptimizedParam] = {}
        self.offloaded: dict[str, Offloaded] = {}
        self._adamw: torch.optim.Optimizer | None = None  # torch refuses one without parameters
        self._in_8_bits = config.name == "adamw8bit"
        if self._in_8_bits:
            eight_bit.check_installed()
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
        if self._adamw is None and self.trained:
            self._adamw = self._build()
        if self._adamw is None:
            return
        for name, entry in added.items():
            state = self._adamw.state[entry.stepped]
            state["step"] = torch.zeros((), dtype=torch.float32, device=local_shard(entry.stepped).device)
            for moment in MOMENTS:
                state[moment] = self._zero_moment(entry.stepped, moment)
            if name in self.offloaded:
                self._restore_state(name)
            if self.config.in_backward:
                entry.parameter.register_post_accumulate_grad_hook(self._hook_of(name))
        self._point_at(self.trained)

    def _build(self) -> torch.optim.Optimizer:
        """Return the optimizer with two groups: what is decayed, and what is not."""
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": self.config.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        if self._in_8_bits:
            return eight_bit.build_adamw8bit(groups, self.config)
        return torch.optim.AdamW(
            groups,
            lr=self.config.lr,
            betas=(self.config.betas[0], self.config.betas[1]),
            eps=self.config.eps,
            fused=True,  # no temporaries; foreach would hold several times the parameters
        )

    def _point_at(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Let the optimizer step what is stepped for ``trained``, each in its group."""
        assert self._adamw is not None
        for group, entries in zip(self._adamw.param_groups, self._by_decay(trained)):
            group["params"] = [entry.stepped for entry in entries.values()]

    def _by_decay(
        self, trained: Mapping[str, OptimizedParam]
    ) -> tuple[dict[str, OptimizedParam], dict[str, OptimizedParam]]:
        """Return what is decayed, and what is not."""
        decayed = {name: entry for name, entry in trained.items() if name not in self.undecayed}
        return decayed, {name: entry for name, entry in trained.items() if name not in decayed}

    def _zero_moment(self, target: torch.Tensor, moment: str) -> torch.Tensor:
        if self._in_8_bits:
            return eight_bit.zero_moment(self._adamw, target, signed=moment == MOMENTS[0])
        return torch.zeros_like(target.detach())

    def remove_params(self, names: Iterable[str]) -> None:
        """Drop parameters; their state too, or it goes to host memory."""
        self.before_change()
        for name in names:
            if self.config.state_on_freeze == "offload":
                tensors = {kind: _to_host(tensor) for kind, tensor in self._state_of(name).items()}
                self.offloaded[name] = Offloaded(self.trained[name].step, tensors)
            entry = self.trained.pop(name)
            entry.parameter.grad = None
            if self._adamw is not None:
                self._adamw.state.pop(entry.stepped, None)
        if self._adamw is not None:
            self._point_at(self.trained)

    def step(self, lr: float) -> None:
        """Make one AdamW step at learning rate ``lr`` and drop the gradients.

        Collective: every rank of the mesh, where the update's transformation of gradients is.
        """
        if self._adamw is not None:
            self._step(self.trained, lr)

    def _step(self, trained: Mapping[str, OptimizedParam], lr: float) -> None:
        assert self._adamw is not None
        self.before_change()
        with torch.no_grad():
            self.update.transform_gradients(trained)
            for entry in trained.values():
                self._turn_moments(entry)
            self._point_at(trained)
            for group in self._adamw.param_groups:
                if self._in_8_bits:
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            self._adamw.step()
            self._point_at(self.trained)
            decayed, undecayed = self._by_decay(trained)
            self.update.apply_steps(decayed, lr * self.config.weight_decay)
            self.update.apply_steps(undecayed, 0.0)
            self.after_step(trained)
        for entry in trained.values():
            entry.step += entry.stepped.grad is not None
            entry.parameter.grad = entry.stepped.grad = None

    def _turn_moments(self, entry: OptimizedParam) -> None:
        """Bring moments into the basis that the gradient is in now. Collective, every rank, where that has changed."""
        if entry.turn_moment is None:
            return
        assert self._adamw is not None
        for moment in MOMENTS:
            live = self._adamw.state[entry.stepped][moment]
            local_shard(live).copy_(entry.turn_moment(eight_bit.in_full(live), moment == MOMENTS[1]))
        entry.turn_moment = None

    @contextmanager
    def stepping_in_backward(self, lr: float, label_tokens: float) -> Iterator[StepInBackward]:
        """Step each parameter as soon as a backward pass within the context has its gradient, which is then dropped.

        There is no clipping: a global norm is known only when all gradients are. Needs ``optimizer.in_backward``.

        Args:
            lr: the learning rate.
            label_tokens: of the global batch; gradients are sums over them.
        """
        self._in_backward = StepInBackward(lr, label_tokens)
        try:
            yield self._in_backward
        finally:
            self._in_backward = None

    def _hook_of(self, name: str) -> Callable[[torch.Tensor], None]:
        def step_at_once(parameter: torch.Tensor) -> None:
            step = self._in_backward
            if step is None or parameter.grad is None:
                return  # a rehearsal or a probe
            gradient = local_shard(parameter.grad)
            gradient.div_(step.label_tokens)
            step.squares[name] = gradient.square().sum()
            self._step({name: self.trained[name]}, step.lr)

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
        """Return the state's tensors by ``<parameter name>.<kind>``: the live tensors, copies of those in 8 bits.

        Kinds are ``exp_avg``, ``exp_avg_sq`` and those that the update keeps beside them. State that waits in host
        memory is among them.
        """
        return {name: eight_bit.in_full(tensor) for name, tensor in self._live_tensors().items()}

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
        assert self._adamw is not None
        entry = self.trained[name]
        return {kind: self._adamw.state[entry.stepped][kind] for kind in MOMENTS} | entry.extra

    def step_counts(self) -> dict[str, int]:
        """Return how many steps each parameter with state has made since it was added."""
        counts = {name: entry.step for name, entry in self.trained.items()}
        return counts | {name: waiting.step for name, waiting in self.offloaded.items()}

    def set_step_counts(self, counts: Mapping[str, int]) -> None:
        """Restore what :meth:`step_counts` returned."""
        for name, waiting in self.offloaded.items():
            waiting.step = counts[name]
        for name, entry in self.trained.items():
            entry.step = counts[name]
            if self._adamw is not None:
                self._adamw.state[entry.stepped]["step"].fill_(counts[name])

    def allocate_offloaded(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make room in host memory for the state of frozen parameters, which a checkpoint will fill."""
        for name, parameter in parameters.items():
            entry = self.update.optimized_param(name, parameter)
            target = entry.stepped.detach().float()  # as it is where it trains, not as it is stored now
            tensors = {kind: self._zero_moment(target, kind) for kind in MOMENTS}
            self.offloaded[name] = Offloaded(0, {k: _to_host(tensor) for k, tensor in (tensors | entry.extra).items()})

    def _restore_state(self, name: str) -> None:
        """Bring a parameter's state back from host memory."""
        waiting = self.offloaded.pop(name)
        for kind, tensor in self._state_of(name).items():
            local_shard(tensor).copy_(local_shard(waiting.tensors[kind]))
        self.trained[name].step = waiting.step
        assert self._adamw is not None
        self._adamw.state[self.trained[name].stepped]["step"].fill_(waiting.step)

    def state_bytes(self) -> int:
        """Return this rank's bytes of moments and of what the update keeps beside them, for what trains now."""
        return sum(stored_bytes(tensor) for name in self.trained for tensor in self._state_of(name).values())

    def offloaded_bytes(self) -> int:
        """Return this rank's bytes of state that waits in host memory."""
        return sum(waiting.nbytes for waiting in self.offloaded.values())


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
