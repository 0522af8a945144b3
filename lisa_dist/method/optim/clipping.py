"""From summed gradients to the mean over label tokens, clipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.dimensions import ParallelDims


@torch.no_grad()
def normalize_and_clip(
    gradients: list[torch.Tensor],
    label_tokens: float,
    max_norm: float,
    parts: Sequence[list[torch.Tensor]] = (),
) -> torch.Tensor:
    """Divide gradients by ``label_tokens``, then clip their global norm to ``max_norm``.

    Collective: every rank of the mesh (one number, and one a part, is summed over each axis that shards).

    Args:
        gradients: of all that trains, sums over the global batch, sharded alike; changed in place.
        label_tokens: label tokens of the global batch.
        max_norm: the largest norm; 0 leaves gradients unclipped.
        parts: of the gradients, lists whose own norms are wanted too.

    Returns:
        The norms before clipping, fp32 on the gradients' device: that of all, then those of the parts, [1 + parts].
    """
    if not gradients:
        return torch.zeros(1 + len(parts))
    shards = [local_shard(gradient) for gradient in gradients]
    torch._foreach_div_(shards, label_tokens)
    wanted = [shards, *([local_shard(gradient) for gradient in part] for part in parts)]
    own = torch.stack([nn.utils.get_total_norm(part).to(shards[0].device) for part in wanted])
    norms = _over_ranks(own, gradients[0])
    if max_norm > 0:
        factor = torch.clamp(max_norm / (norms[0] + 1e-6), max=1.0)
        torch._foreach_mul_(shards, factor)
    return norms


def norms_of_squares(
    squares: Mapping[str, torch.Tensor], parts: Sequence[list[str]], dims: ParallelDims
) -> torch.Tensor:
    """Return the norms that :func:`normalize_and_clip` does, of gradients that are gone. Collective: every rank.

    Args:
        squares: by parameter name the sum of squares of this rank's shard of its gradient.
        parts: of these names, lists whose own norms are wanted too.
        dims: which ranks hold which shard.
    """
    zero = torch.zeros((), device=distributed.device())
    wanted = [list(squares), *([name for name in part if name in squares] for part in parts)]
    sums = torch.stack([sum((squares[name] for name in names), zero) for names in wanted])
    return (dims.sum_on_device(sums) / dims.replicate).sqrt()


def _over_ranks(norms: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the norms of all shards from those of this rank's. Collective: every rank of the mesh of ``like``.

    DTensors would sum the norm of each gradient by itself, and warn of a mesh with two axes that shard. In fp64,
    where no square overflows.
    """
    if not isinstance(like, DTensor):
        return norms
    parts: list[Placement] = [Partial() if isinstance(axis, Shard) else Replicate() for axis in like.placements]
    squares = DTensor.from_local(norms.double().square(), like.device_mesh, parts, run_check=False)
    for axis in range(len(parts)):
        parts[axis] = Replicate()
        squares = squares.redistribute(placements=parts)
    return squares.to_local().to(norms.device).sqrt().float()
