"""From summed gradients to the mean over label tokens, clipped."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lisa_dist.distributed import local_shard


@torch.no_grad()
def normalize_and_clip(gradients: list[torch.Tensor], label_tokens: float, max_norm: float) -> torch.Tensor:
    """Divide gradients by ``label_tokens``, then clip their global norm to ``max_norm``.

    Collective: every rank of the mesh (one number is summed over each axis that shards).

    Args:
        gradients: of all that trains, sums over the global batch, sharded alike; changed in place.
        label_tokens: label tokens of the global batch.
        max_norm: the largest norm; 0 leaves gradients unclipped.

    Returns:
        The norm before clipping, an fp32 scalar on the gradients' device.
    """
    if not gradients:
        return torch.zeros(())
    shards = [local_shard(gradient) for gradient in gradients]
    torch._foreach_div_(shards, label_tokens)
    norm = _over_ranks(nn.utils.get_total_norm(shards), gradients[0])
    if max_norm > 0:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(shards, factor)
    return norm


def _over_ranks(norm: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the norm of all shards from that of this rank's. Collective: every rank of the mesh of ``like``.

    DTensors would sum the norm of each gradient by itself, and warn of a mesh with two axes that shard. In fp64,
    where no square overflows.
    """
    if not isinstance(like, DTensor):
        return norm
    parts: list[Placement] = [Partial() if isinstance(axis, Shard) else Replicate() for axis in like.placements]
    squares = DTensor.from_local(norm.double().square(), like.device_mesh, parts, run_check=False)
    for axis in range(len(parts)):
        parts[axis] = Replicate()
        squares = squares.redistribute(placements=parts)
    return squares.to_local().to(norm.device).sqrt().float()
