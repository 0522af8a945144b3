"""From summed gradients to the mean over label tokens, clipped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lisa_dist.distributed import local_shard


@torch.no_grad()
def normalize_and_clip(parameters: Iterable[nn.Parameter], label_tokens: float, max_norm: float) -> torch.Tensor:
    """Divide gradients by ``label_tokens``, then clip their global norm to ``max_norm``.

    Collective: every rank of the mesh (one reduction of the norm).

    Args:
        parameters: the trained parameters; their gradients are sums over the global batch.
        label_tokens: label tokens of the global batch.
        max_norm: the largest norm; 0 leaves gradients unclipped.

    Returns:
        The norm before clipping, an fp32 scalar on the parameters' device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    torch._foreach_div_([local_shard(gradient) for gradient in gradients], label_tokens)
    norm = nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)
    return norm
