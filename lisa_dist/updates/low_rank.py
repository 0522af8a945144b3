"""GaLore: Adam's moments in a low-rank projection of the gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lisa_dist import distributed
from lisa_dist.config import UserError
from lisa_dist.config.method import LowRankUpdateConfig
from lisa_dist.distributed import as_sharded, local_shard
from lisa_dist.models.layer_map import LayerMap, linear_layers
from lisa_dist.updates.base import Trained, Update
from lisa_dist.updates.sharded import fill, sharded_zeros, whole

logger = logging.getLogger(__name__)

PROJECTOR = "projector"


class LowRank(Update):
    """GaLore (arXiv 2403.03507, Algorithm 2): W <- W + scale * P step(P^T G), with P from the SVD of G.

    Of a gradient G, [m, n] of rank r, every ``refresh_every`` steps of the parameter:

        m >= n:  R = G V,    V the first r right singular vectors of G, [n, r];  W <- W + scale * step(R) V^T
        m <  n:  R = U^T G,  U the first r left singular vectors, [m, r];        W <- W + scale * U step(R)

    ``step`` is AdamW's on R, so its moments have R's shape; they are kept when the projection changes. Weight
    decay acts on W. The linear layers of active blocks are projected, all else trains at full rank.

    Sharded: G is a DTensor of rows. A projection is found matrix by matrix: each whole G exists on its own, and
    each SVD is made on one rank and broadcast. Projectors and moments are sharded over rows; the projected
    step costs one collective of a thin matrix. The public code (https://github.com/jiaweizzhao/GaLore) keeps
    moments and projectors of every layer for ever and runs on one device; here a freeze drops both.
    """

    def __init__(self, config: LowRankUpdateConfig) -> None:
        self.config = config
        self.ranks: dict[str, int] = {}  # of the parameters that are projected

    def prepare_model(self, model: nn.Module, layers: LayerMap) -> None:
        """Note which parameters are projected, and to what rank; nothing is changed.

        Raises:
            UserError: ``update.rank`` is larger than a matrix has.
        """
        largest = {}
        for block_name, block in zip(layers.block_names, layers.blocks):
            for name, layer in linear_layers(block).items():
                if min(layer.weight.shape) == 1:  # a gate with one output has no lower rank
                    continue
                largest[f"{block_name}.{name}.weight"] = min(layer.weight.shape)
        self.ranks = {name: choose_rank(self.config, name, limit) for name, limit in largest.items()}
        cut = [name for name, limit in largest.items() if self.config.rank is None and limit < self.config.preset_rank]
        if cut:
            smallest = min(self.ranks.values())
            logger.info(
                "the projections of %d matrices have the matrix's own rank, down to %d, instead of %d",
                len(cut), smallest, self.config.preset_rank,
            )  # fmt: skip

    def adopt(self, name: str, parameter: nn.Parameter) -> Trained:
        """Return a stand-in of the projected gradient's shape, and room for the projector."""
        if name not in self.ranks:
            return Trained(parameter, parameter)
        (rows, columns), rank = parameter.shape, self.ranks[name]
        shape = (rows, rank) if rows >= columns else (rank, columns)
        stand_in = nn.Parameter(sharded_zeros(parameter, shape))
        return Trained(parameter, stand_in, {PROJECTOR: sharded_zeros(parameter, (min(rows, columns), rank))})

    def transform_gradients(self, trained: Mapping[str, Trained]) -> None:
        """Project the gradients, and free them; refresh the projectors that are due. Collective: every rank."""
        projected = {name: entry for name, entry in trained.items() if PROJECTOR in entry.extra}
        due = [entry for entry in projected.values() if entry.step % self.config.refresh_every == 0]
        refresh_projectors([entry for entry in due if entry.parameter.grad is not None])
        for entry in projected.values():
            if entry.parameter.grad is not None:
                entry.target.grad = project(entry.parameter.grad, entry.extra[PROJECTOR], entry.target)
                entry.parameter.grad = None

    def apply_steps(self, trained: Mapping[str, Trained], decay: float) -> None:
        """Project the steps of the stand-ins back onto the parameters. Collective: every rank."""
        for entry in trained.values():
            if PROJECTOR not in entry.extra or entry.target.grad is None:
                continue
            step = project_back(entry.target.detach(), entry.extra[PROJECTOR], entry.parameter)
            local_shard(entry.parameter.detach()).mul_(1 - decay).add_(step, alpha=self.config.scale)
            local_shard(entry.target.detach()).zero_()


def choose_rank(config: LowRankUpdateConfig, name: str, largest: int) -> int:
    """Return the rank of a projection, at most ``largest``.

    Raises:
        UserError: ``update.rank`` asks for more.
    """
    if config.rank is None:
        return min(config.preset_rank, largest)
    if config.rank > largest:
        raise UserError(f"update.rank={config.rank}: must be at most {largest}, the rank that {name} can have")
    return config.rank


def singular_vectors(gradient: Tensor, rank: int) -> Tensor:
    """Return the first ``rank`` singular vectors of the smaller side of a whole [m, n] gradient, as columns."""
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    return right[:rank].T if gradient.shape[0] >= gradient.shape[1] else left[:, :rank]


def refresh_projectors(entries: list[Trained]) -> None:
    """Compute the projectors from the gradients. Collective: every rank.

    The matrices are dealt to the ranks in turn, so that as many SVDs run at once as there are ranks. A rank holds
    two whole gradients at most: its own, and the one that is being gathered.
    """
    ranks = distributed.world_size()
    for start in range(0, len(entries), ranks):
        chunk = entries[start : start + ranks]
        mine: Tensor | None = None
        for owner, entry in enumerate(chunk):
            assert entry.parameter.grad is not None
            gradient = whole(entry.parameter.grad)
            if owner == distributed.rank():
                mine = gradient
            del gradient
        for owner, entry in enumerate(chunk):
            projector = entry.extra[PROJECTOR]
            full = local_shard(projector).new_empty(projector.shape)
            if owner == distributed.rank():
                assert mine is not None
                full.copy_(singular_vectors(mine, projector.shape[1]))
            if ranks > 1:
                dist.broadcast(full, src=owner)
            fill(projector, full)


def project(gradient: Tensor, projector: Tensor, like: Tensor) -> Tensor:
    """Return the projected gradient, sharded as ``like``. Collective: every rank of the mesh."""
    rows = local_shard(gradient).float()
    if gradient.shape[0] >= gradient.shape[1]:
        return as_sharded(rows @ whole(projector), like, tuple(like.shape))
    part = local_shard(projector).T @ rows  # this rank's rows of both: a part of the sum over all rows
    if not isinstance(like, DTensor):
        return part
    mesh = like.device_mesh
    sums = [Partial() if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    return DTensor.from_local(part, mesh, sums, run_check=False).redistribute(mesh, like.placements)


def project_back(step: Tensor, projector: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's rows of the step in the parameter's own space. Collective: every rank of the mesh."""
    if parameter.shape[0] >= parameter.shape[1]:
        return local_shard(step) @ whole(projector).T
    return local_shard(projector) @ whole(step)
