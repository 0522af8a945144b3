"""LISA in plain PyTorch: one process, no FSDP, no part of the package. What the trainer must agree with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def train_plainly(
    model: nn.Module,
    blocks: list[nn.Module],
    always: list[nn.Parameter],
    global_batches: list[list[dict[str, torch.Tensor]]],
    draws: list[list[int]],
    period: int,
    learning_rates: list[float],
    weight_decay: float,
    grad_clip: float,
) -> list[float]:
    """Train ``model`` in place for ``len(learning_rates)`` steps and return the losses.

    Args:
        blocks: the decoder blocks, in order.
        always: the parameters that train in every period.
        global_batches: for each step its micro-batches (input_ids, position_ids, labels).
        draws: the active blocks of each period.
        period: steps between draws.
        learning_rates: one a step.
    """

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Norms and biases, here all that is no matrix, have no weight decay."""
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        rest = [parameter for parameter in parameters if parameter.dim() == 1]
        groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)

    always_optimizer = adamw(always)
    block_optimizers: dict[int, torch.optim.Optimizer] = {}
    losses = []
    for step, lr in enumerate(learning_rates):
        if step % period == 0:
            active = draws[step // period]
            for index, block in enumerate(blocks):
                block.requires_grad_(index in active)
            block_optimizers = {
                index: block_optimizers.get(index) or adamw(list(blocks[index].parameters())) for index in active
            }
        total = torch.zeros(())
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in global_batches[step])
        for batch in global_batches[step]:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
            )
            (loss / tokens).backward()
            total += loss.detach()
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if grad_clip > 0:
            nn.utils.clip_grad_norm_(trained, grad_clip)
        for optimizer in (always_optimizer, *block_optimizers.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for parameter in trained:
            parameter.grad = None
        losses.append(total.item() / tokens)
    return losses
