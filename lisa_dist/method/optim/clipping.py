"""From summed gradients to the mean over label tokens, clipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.dimensions import ParallelDims


@torch.no_grad()
def mean_norms(
    gradients: list[torch.Tensor], label_tokens: float, parts: Sequence[list[torch.Tensor]] = ()
) -> torch.Tensor:
    """Return the norms of gradients divided by ``label_tokens``, which are read once and left as they are.

    Collective: every rank of the mesh (one number, and one a part, is summed over each axis that shards).

    Args:
        gradients: of all that trains, sums over the global batch, sharded alike.
        label_tokens: label tokens of the global batch.
        parts: of the gradients, lists whose own norms are wanted too.

    Returns:
        That of all, then those of the parts, fp32 on the gradients' device, [1 + parts].
    """
    if not gradients:
        return torch.zeros(1 + len(parts))
    shards = [local_shard(gradient) for gradient in gradients]
    wanted = [shards, *([local_shard(gradient) for gradient in part] for part in parts)]
    own = torch.stack([_norm(part).to(shards[0].device) for part in wanted])
    norms = _over_ranks(own, gradients[0])
    return (norms.double() / label_tokens).float()


def clipping_divisor(norm: torch.Tensor, label_tokens: float, max_norm: float) -> torch.Tensor:
    """Return what brings gradients from sums over label tokens to their mean, clipped to ``max_norm``: a divisor.

    Args:
        norm: of the mean, a scalar.
        label_tokens: label tokens of the global batch.
        max_norm: the largest norm; 0 leaves gradients unclipped.

    Returns:
        A scalar, fp32 where ``norm`` is; the host waits for nothing.
    """
    if max_norm <= 0:
        return torch.full_like(norm, label_tokens)
    factor = torch.clamp(max_norm / (norm.double() + 1e-6), max=1.0)
    return (label_tokens / factor).float()


def norms_of_squares(
    squares: Mapping[str, torch.Tensor], parts: Sequence[list[str]], dims: ParallelDims
) -> torch.Tensor:
    """Return the norms that :func:`mean_norms` does, of gradients that are gone. Collective: every rank.

    Args:
        squares: by parameter name the sum of squares of this rank's shard of its mean gradient.
        parts: of these names, lists whose own norms are wanted too.
        dims: which ranks hold which shard.
    """
    zero = torch.zeros((), device=distributed.device())
    wanted = [list(squares), *([name for name in part if name in squares] for part in parts)]
    sums = torch.stack([sum((squares[name] for name in names), zero) for names in wanted])
    return (dims.sum_on_device(sums) / dims.replicate).sqrt()


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all tensors together, in fp32 whatever their dtype."""
    norms = torch._foreach_norm(tensors, dtype=torch.float32) if tensors else [torch.zeros(())]
    return torch.linalg.vector_norm(torch.stack(norms))


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
