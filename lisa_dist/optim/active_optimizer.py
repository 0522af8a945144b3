"""AdamW over the parameters that train now: state exists for these only, as DTensors on the same mesh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lisa_dist.config import OptimizerConfig
from lisa_dist.distributed import local_shard

MOMENTS = ("exp_avg", "exp_avg_sq")


class ActiveOptimizer:
    """AdamW (arXiv 1711.05101) whose set of parameters changes from period to period.

    A parameter that is adopted starts with zero moments and a step count of zero, so its bias correction
    starts anew; a parameter that is released leaves nothing behind.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.parameters: dict[str, nn.Parameter] = {}
        self._adamw: torch.optim.AdamW | None = None  # torch refuses an optimizer without parameters

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take parameters in, with zero state made at once, so that a checkpoint before the next step has it.

        The order is that of the names, whatever came first: sums over parameters must not depend on history.
        """
        self.parameters = dict(sorted({**self.parameters, **parameters}.items()))
        if self._adamw is None and self.parameters:
            self._adamw = torch.optim.AdamW(
                list(self.parameters.values()),
                lr=self.config.lr,
                betas=(self.config.betas[0], self.config.betas[1]),
                eps=self.config.eps,
                weight_decay=self.config.weight_decay,
                fused=True,  # no temporaries; foreach would hold several times the parameters
            )
        if self._adamw is None:
            return
        for parameter in parameters.values():
            state = self._adamw.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=local_shard(parameter).device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter.detach())
        self._adamw.param_groups[0]["params"] = list(self.parameters.values())

    def release(self, names: Iterable[str]) -> None:
        """Drop parameters with their state."""
        for name in names:
            parameter = self.parameters.pop(name)
            parameter.grad = None
            if self._adamw is not None:
                self._adamw.state.pop(parameter, None)
        if self._adamw is not None:
            self._adamw.param_groups[0]["params"] = list(self.parameters.values())

    def step(self, lr: float) -> None:
        """Make one AdamW step at learning rate ``lr`` and drop the gradients."""
        if self._adamw is not None:
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()
            self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def moment_tensors(self) -> dict[str, torch.Tensor]:
        """Return the moments by ``<parameter name>.<exp_avg|exp_avg_sq>``: the live tensors, no copies."""
        if self._adamw is None:
            return {}
        state = self._adamw.state
        return {f"{name}.{kind}": state[p][kind] for name, p in self.parameters.items() for kind in MOMENTS}

    def step_counts(self) -> dict[str, int]:
        """Return how many steps each parameter has made since it was adopted."""
        if self._adamw is None:
            return {}
        return {name: int(self._adamw.state[parameter]["step"]) for name, parameter in self.parameters.items()}

    def set_step_counts(self, counts: Mapping[str, int]) -> None:
        """Restore what :meth:`step_counts` returned."""
        if self._adamw is not None:
            for name, parameter in self.parameters.items():
                self._adamw.state[parameter]["step"].fill_(counts[name])

    def state_bytes(self) -> int:
        """Return this rank's bytes of moments."""
        return sum(local_shard(tensor).nbytes for tensor in self.moment_tensors().values())
