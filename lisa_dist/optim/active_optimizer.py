"""AdamW over the parameters that train now: state exists for these only, as DTensors on the same mesh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lisa_dist.config import OptimizerConfig
from lisa_dist.distributed import local_shard
from lisa_dist.updates import Trained, Update

MOMENTS = ("exp_avg", "exp_avg_sq")


class ActiveOptimizer:
    """AdamW (arXiv 1711.05101) whose set of parameters changes from period to period.

    A parameter that is adopted starts with zero moments and a step count of zero, so its bias correction
    starts anew; a parameter that is released leaves nothing behind. What AdamW steps is the parameter itself,
    or the update's stand-in for it.
    """

    def __init__(self, config: OptimizerConfig, update: Update) -> None:
        self.config = config
        self.update = update
        self.trained: dict[str, Trained] = {}
        self._adamw: torch.optim.AdamW | None = None  # torch refuses an optimizer without parameters

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: entry.parameter for name, entry in self.trained.items()}

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take parameters in, with zero state made at once, so that a checkpoint before the next step has it.

        The order is that of the names, whatever came first: sums over parameters must not depend on history.
        """
        adopted = {name: self.update.adopt(name, parameter) for name, parameter in parameters.items()}
        self.trained = dict(sorted({**self.trained, **adopted}.items()))
        if self._adamw is None and self.trained:
            self._adamw = torch.optim.AdamW(
                self._targets(),
                lr=self.config.lr,
                betas=(self.config.betas[0], self.config.betas[1]),
                eps=self.config.eps,
                weight_decay=self.config.weight_decay,
                fused=True,  # no temporaries; foreach would hold several times the parameters
            )
        if self._adamw is None:
            return
        for entry in adopted.values():
            state = self._adamw.state[entry.target]
            state["step"] = torch.zeros((), dtype=torch.float32, device=local_shard(entry.target).device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(entry.target.detach())
        self._adamw.param_groups[0]["params"] = self._targets()

    def release(self, names: Iterable[str]) -> None:
        """Drop parameters with their state."""
        for name in names:
            entry = self.trained.pop(name)
            entry.parameter.grad = None
            if self._adamw is not None:
                self._adamw.state.pop(entry.target, None)
        if self._adamw is not None:
            self._adamw.param_groups[0]["params"] = self._targets()

    def step(self, lr: float) -> None:
        """Make one AdamW step at learning rate ``lr`` and drop the gradients.

        Collective: every rank of the mesh, where the update's transformation of gradients is.
        """
        if self._adamw is None:
            return
        with torch.no_grad():
            self.update.transform_gradients(self.trained)
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()
            self.update.apply_steps(self.trained, lr * self.config.weight_decay)
        for entry in self.trained.values():
            entry.step += entry.target.grad is not None
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for entry in self.trained.values():
            entry.parameter.grad = entry.target.grad = None

    def moment_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state's tensors by ``<parameter name>.<kind>``: the live tensors, no copies.

        Kinds are ``exp_avg``, ``exp_avg_sq`` and those that the update keeps beside them.
        """
        if self._adamw is None:
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, entry in self.trained.items():
            found |= {f"{name}.{kind}": self._adamw.state[entry.target][kind] for kind in MOMENTS}
            found |= {f"{name}.{kind}": tensor for kind, tensor in entry.extra.items()}
        return found

    def step_counts(self) -> dict[str, int]:
        """Return how many steps each parameter has made since it was adopted."""
        return {name: entry.step for name, entry in self.trained.items()}

    def set_step_counts(self, counts: Mapping[str, int]) -> None:
        """Restore what :meth:`step_counts` returned."""
        for name, entry in self.trained.items():
            entry.step = counts[name]
            if self._adamw is not None:
                self._adamw.state[entry.target]["step"].fill_(counts[name])

    def state_bytes(self) -> int:
        """Return this rank's bytes of moments and of what the update keeps beside them."""
        return sum(local_shard(tensor).nbytes for tensor in self.moment_tensors().values())

    def _targets(self) -> list[nn.Parameter]:
        return [entry.target for entry in self.trained.values()]
