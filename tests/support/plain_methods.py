"""The neighbours of LISA in plain PyTorch, from their formulas: one process, no part of the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.config import Config

BETAS, EPS = (0.9, 0.999), 1e-8
Batch = dict[str, torch.Tensor]


class PlainAdamW:
    """AdamW (arXiv 1711.05101, Algorithm 2) on one tensor at a time."""

    def __init__(self, weight_decay: float, eps: float = EPS) -> None:
        self.weight_decay, self.eps = weight_decay, eps
        self.state: dict[str, list[Any]] = {}

    def direction(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The bias-corrected direction of a step along a gradient; to be multiplied by minus the learning rate."""
        step, first, second = self.state.setdefault(name, [0, torch.zeros_like(gradient), torch.zeros_like(gradient)])
        step += 1
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        self.state[name] = [step, first, second]
        return (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + self.eps)


class PlainLion(PlainAdamW):
    """Lion (arXiv 2302.06675, Algorithm 2) on one tensor at a time."""

    def direction(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The signs of a step along a gradient; to be multiplied by minus the learning rate."""
        step, moment = self.state.setdefault(name, [0, torch.zeros_like(gradient)])
        self.state[name] = [step + 1, 0.99 * moment + (1 - 0.99) * gradient]
        return torch.sign(0.9 * moment + (1 - 0.9) * gradient)


class PlainGaLore:
    """GaLore (arXiv 2403.03507, Algorithm 2): AdamW, or Lion, in the space of the gradient's first singular vectors.

    Moments are carried over into a new basis; of three dimensions the first counts experts.
    """

    def __init__(self, rank: int, refresh_every: int, scale: float) -> None:
        self.rank, self.refresh_every, self.scale = rank, refresh_every, scale
        self.projections: dict[str, torch.Tensor] = {}
        self.steps: dict[str, int] = {}

    def direction(self, adam: PlainAdamW, name: str, gradient: torch.Tensor) -> torch.Tensor:
        step = self.steps.get(name, 0)
        self.steps[name] = step + 1
        tall = gradient.shape[-2] >= gradient.shape[-1]
        if step % self.refresh_every == 0:
            left, _, right = torch.linalg.svd(gradient, full_matrices=False)
            basis = right[..., : self.rank, :].mT if tall else left[..., :, : self.rank]
            if step > 0:
                self.carry(adam.state[name], self.projections[name].mT @ basis, tall)
            self.projections[name] = basis
        basis = self.projections[name]
        if tall:
            return self.scale * adam.direction(name, gradient @ basis) @ basis.mT
        return self.scale * basis @ adam.direction(name, basis.mT @ gradient)

    def in_blocks(self, adam: PlainAdamW, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The direction where matrices in blocks are projected; one that was frozen since begins anew."""
        if ".layers." not in name or gradient.dim() != 2:
            return adam.direction(name, gradient)
        if name not in adam.state:
            self.steps[name] = 0  # its moments are gone, and so is its projector
        return self.direction(adam, name, gradient)

    @staticmethod
    def carry(state: list[Any], overlap: torch.Tensor, tall: bool) -> None:
        """Express the moments, [step, first] or [step, first, second], in the new basis, by P_old^T P_new."""
        first, *rest = (moment if tall else moment.mT for moment in state[1:])
        shares = overlap**2
        rest = [second @ shares + second * (1 - shares.sum(-2, keepdim=True)) for second in rest]
        state[1:] = [moment if tall else moment.mT for moment in (first @ overlap, *rest)]


def train_by_hand(
    model: nn.Module,
    trained: Callable[[int], list[str]],
    global_batches: list[list[Batch]],
    learning_rates: list[float],
    weight_decay: float,
    grad_clip: float,
    direction: Callable[[PlainAdamW, str, torch.Tensor], torch.Tensor],
    keeps_state: bool = False,
    lion: bool = False,
    eps: float = EPS,
) -> list[float]:
    """Train ``model`` in place and return the losses.

    Args:
        trained: the names of the parameters that train in a step.
        direction: the step of a parameter along its (clipped) gradient.
        keeps_state: of parameters that do not train; else it is forgotten.
        lion: instead of AdamW.
        eps: AdamW's.
    """
    adam = PlainLion(weight_decay) if lion else PlainAdamW(weight_decay, eps)
    parameters = dict(model.named_parameters())
    losses = []
    for step, lr in enumerate(learning_rates):
        names = trained(step)
        adam.state = {name: state for name, state in adam.state.items() if keeps_state or name in names}
        loss = mean_loss(model, global_batches[step])
        gradients = dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names])))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        factor = min(1.0, grad_clip / (norm + 1e-6))
        with torch.no_grad():
            for name, gradient in gradients.items():
                # Norms and biases are not decayed, those of fused experts, which have two dimensions, among them.
                if not (name.endswith("bias") or "norm" in name or ".ln_" in name):
                    parameters[name].mul_(1 - lr * weight_decay)
                parameters[name].sub_(lr * direction(adam, name, gradient * factor))
        losses.append(loss.item())
    return losses


def mean_loss(model: nn.Module, micro_batches: list[Batch]) -> torch.Tensor:
    """The mean loss over the label tokens of several micro-batches."""
    total = torch.zeros(())
    for batch in micro_batches:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        total = total + functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
    return total / sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)


def plain_model(config: Config) -> nn.Module:
    fields = dict(config.model.architecture)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def adam(optimizer: Any, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """The direction of a plain optimizer by itself, AdamW's or Lion's."""
    return optimizer.direction(name, gradient)
