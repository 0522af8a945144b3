"""GaLore: Adam's moments in a low-rank projection of the gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from lisa_dist.config import UserError
from lisa_dist.config.updates import LowRankUpdateConfig
from lisa_dist.method.updates import projection
from lisa_dist.method.updates.base import OptimizedParam, Update
from lisa_dist.method.updates.projection import is_tall
from lisa_dist.method.updates.sharded import keyed_generator, sharded_zeros, whole
from lisa_dist.models.layer_map import LayerMap, linear_layers
from lisa_dist.models.matrices import weight_matrices
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import as_sharded, computed_on, fill, local_region, local_shard
from lisa_dist.runtime.units import format_count

logger = logging.getLogger(__name__)

PROJECTOR = "projector"
ELEMENTS_AT_ONCE = 1 << 26  # of experts' gradients whose bases are found together: bounds the temporaries


class LowRank(Update):
    """GaLore (arXiv 2403.03507, Algorithm 2): W <- W + scale * P step(P^T G), with P from the SVD of G.

    Of a gradient G, [m, n] of rank r, every ``refresh_every`` steps of the parameter:

        m >= n:  R = G V,    V the first r right singular vectors of G, [n, r];  W <- W + scale * step(R) V^T
        m <  n:  R = U^T G,  U the first r left singular vectors, [m, r];        W <- W + scale * U step(R)

    ``step`` is AdamW's on R, so its moments have R's shape; where the projection changes they are carried over into
    the new basis. Weight decay acts on W. The weight matrices of active blocks are projected, of fused experts each
    expert's by itself, all else trains at full rank.

    Sharded: G is a DTensor of rows. A projection is found matrix by matrix: each whole G exists on its own, and
    each SVD is made on one rank and broadcast. Projectors and moments are sharded over rows; the projected
    step costs one collective of a thin matrix. A shard of fused experts holds whole matrices, so that these need no
    communication at all. The public code (https://github.com/jiaweizzhao/GaLore) keeps moments and projectors of every
    layer for ever and runs on one device; here a freeze drops both.
    """

    needs_finite_gradients = True  # projections are made of them

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
            linear = {f"{path}.weight" for path in linear_layers(block)}
            for name, matrix in weight_matrices(block).items():
                limit = min(matrix.shape[-2:])
                # A router has as few rows as there are experts; projected to as many dimensions it would save nothing.
                is_router = matrix.dim() == 2 and name not in linear
                if not is_router or limit > (self.config.rank or self.config.preset_rank):
                    largest[f"{block_name}.{name}"] = limit
        self.ranks = {name: choose_rank(self.config, name, limit) for name, limit in largest.items()}
        cut = [name for name, limit in largest.items() if self.config.rank is None and limit < self.config.preset_rank]
        if cut:
            smallest = min(self.ranks.values())
            logger.info(
                "the projections of %d matrices have the matrix's own rank, down to %d, instead of %d",
                len(cut), smallest, self.config.preset_rank,
            )  # fmt: skip

    def optimized_param(self, name: str, parameter: nn.Parameter) -> OptimizedParam:
        """Return a parameter of the projected gradient's shape to be stepped, and room for the projector."""
        if name not in self.ranks:
            return OptimizedParam(parameter, parameter)
        (*experts, rows, columns), rank = parameter.shape, self.ranks[name]
        shape = (*experts, rows, rank) if rows >= columns else (*experts, rank, columns)
        stand_in = nn.Parameter(sharded_zeros(parameter, shape))
        projector = sharded_zeros(parameter, (*experts, min(rows, columns), rank))
        return OptimizedParam(parameter, stand_in, {PROJECTOR: projector})

    def transform_gradients(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Project the gradients, and free them; refresh the projectors that are due. Collective: every rank."""
        projected = {
            name: entry
            for name, entry in trained.items()
            if PROJECTOR in entry.extra and entry.parameter.grad is not None
        }
        due = {name: entry for name, entry in projected.items() if entry.step % self.config.refresh_every == 0}
        matrices = {name: entry for name, entry in due.items() if entry.parameter.dim() == 2}
        held: dict[str, Tensor | None] = {**refresh_matrices(matrices, self.config.projector)}
        for name, entry in projected.items():
            if entry.parameter.dim() == 3:
                held[name] = refresh_experts(name, entry, self.config.projector, due=name in due)
        for name, entry in projected.items():
            entry.stepped.grad = project(entry, held.get(name))
            entry.parameter.grad = None

    def describe_coverage(self, parameters: Mapping[str, nn.Parameter], layers: LayerMap) -> str:
        """Return how much of the blocks is projected, and what is not."""
        inside = {name: p.numel() for name, p in parameters.items() if layers.group_of(name).startswith("block:")}
        rest = {name: size for name, size in inside.items() if name not in self.ranks}
        total, left = sum(inside.values()), sum(rest.values())
        others = [n for n in rest if parameters[n].dim() > 1 and not n.endswith("bias") and "norm" not in n]
        named = "".join(f", {path}" for path in sorted({layers.path_in_block(name) for name in others}))
        return (
            f"{format_count(total - left)} of the {format_count(total)} parameters in the blocks are projected "
            f"({(total - left) / total:.1%}); {format_count(left)} train at full rank: norms, biases{named}"
        )

    def apply_steps(self, trained: Mapping[str, OptimizedParam], decay: float) -> None:
        """Project the steps of what was stepped back onto the parameters. Collective: every rank."""
        for entry in trained.values():
            if PROJECTOR not in entry.extra or entry.stepped.grad is None:
                continue
            step = project_back(entry.stepped.detach(), entry.extra[PROJECTOR], entry.parameter)
            local_shard(entry.parameter.detach()).mul_(1 - decay).add_(step, alpha=self.config.scale)
            local_shard(entry.stepped.detach()).zero_()


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


def refresh_matrices(entries: Mapping[str, OptimizedParam], projector: str) -> dict[str, Tensor]:
    """Compute the projectors of matrices from their gradients. Collective: every rank.

    The matrices are dealt to the ranks in turn, so that as many are decomposed at once as there are ranks. A rank holds
    two whole gradients at most: its own, and the one that is being gathered.

    Returns:
        by name, which columns of the basis the gradient has, as :func:`projection.find_basis` does.
    """
    ranks, names, held = distributed.world_size(), list(entries), {}
    for start in range(0, len(names), ranks):
        chunk = names[start : start + ranks]
        mine: Tensor | None = None
        for owner, name in enumerate(chunk):
            gradient = entries[name].parameter.grad
            assert gradient is not None
            gradient = whole(gradient)
            if owner == distributed.rank():
                mine = gradient
            del gradient
        for owner, name in enumerate(chunk):
            entry, basis = entries[name], entries[name].extra[PROJECTOR]
            smaller, rank = basis.shape
            is_new, device = entry.step == 0, computed_on(basis)
            old = local_shard(basis).new_zeros(smaller, rank, device=device) if is_new else whole(basis)
            sent = torch.empty(smaller + 1, rank, dtype=old.dtype, device=old.device)
            if owner == distributed.rank():
                assert mine is not None
                sent.copy_(torch.cat(decompose(name, entry, mine.float(), old, projector)))
            if ranks > 1:
                dist.broadcast(sent, src=owner)
            new, held[name] = sent[:-1], sent[-1:]
            overlap = old.T @ new  # before the basis, which on one rank is the old one's very memory, is overwritten
            fill(basis, new)
            if entry.step > 0:
                entry.turn_moment = partial(turn_sharded, overlap=overlap, tall=is_tall(entry.parameter.shape))
    return held


def refresh_experts(name: str, entry: OptimizedParam, projector: str, due: bool) -> Tensor | None:
    """Compute the projectors of this rank's experts from their gradients. No communication.

    An expert that had no tokens keeps its projector; one that has none yet gets it at the first step with tokens.

    Args:
        name: of the parameter.
        entry: the parameter, of three dimensions.
        projector: how a basis is found.
        due: whether all experts are; otherwise those that have no projector yet.

    Returns:
        which columns of the bases the gradients have, [experts, 1, r]; None where nothing was refreshed.
    """
    assert entry.parameter.grad is not None
    stored, device = local_shard(entry.extra[PROJECTOR]), computed_on(entry.extra[PROJECTOR])
    bases, gradients = stored.to(device), local_shard(entry.parameter.grad).to(device)
    if due:
        chosen = list(range(len(bases)))
    else:
        without = ~bases[..., 0].any(-1)  # the first column of a basis is never zero
        chosen = (without & gradients.flatten(1).any(-1)).nonzero().flatten().tolist() if len(bases) else []
    if not chosen:
        return None
    held = bases.new_ones(len(bases), 1, bases.shape[-1])
    overlap = torch.eye(bases.shape[-1], device=bases.device).repeat(len(bases), 1, 1)
    at_once = max(1, ELEMENTS_AT_ONCE // gradients[0].numel())
    for start in range(0, len(chosen), at_once):
        part = slice(chosen[start], chosen[start] + at_once) if due else chosen[start : start + at_once]
        gradient, old = gradients[part].float(), bases[part]
        new, held[part] = decompose(name, entry, gradient, old, projector)
        seen = gradient.flatten(1).any(-1)[:, None, None]
        new = torch.where(seen, new, old)
        overlap[part] = torch.where(seen, old.mT @ new, overlap[part])
        bases[part] = new
    if bases is not stored:  # in host memory, with parallel.offload=all
        stored.copy_(bases)
    if due and entry.step > 0:
        entry.turn_moment = partial(turn_local, overlap=overlap, tall=is_tall(entry.parameter.shape))
    return held


def decompose(name: str, entry: OptimizedParam, gradient: Tensor, old: Tensor, projector: str) -> tuple[Tensor, Tensor]:
    """Return what :func:`projection.find_basis` finds; random numbers are keyed by parameter and step alone."""
    smaller, rank = old.shape[-2:]
    noise = torch.randn(
        smaller, projection.noise_columns(rank, smaller), generator=keyed_generator(entry.step, name)
    ).to(gradient.device)
    return projection.find_basis(gradient, rank, noise, old if projector == "randomized" else None)


def turn_sharded(moment: Tensor, squared: bool, overlap: Tensor, tall: bool) -> Tensor:
    """Return this rank's rows of the moment of a matrix in its new basis. Collective, every rank, where it is wide."""
    if tall:
        return turn_local(moment, squared, overlap, tall)
    return projection.turn_moment(whole(moment), overlap, tall, squared)[local_region(moment)]


def turn_local(moment: Tensor, squared: bool, overlap: Tensor, tall: bool) -> Tensor:
    """Return this rank's rows of a moment in their new bases, on the device of ``overlap``. No communication."""
    return projection.turn_moment(local_shard(moment).to(overlap.device), overlap, tall, squared)


def project(entry: OptimizedParam, held: Tensor | None) -> Tensor:
    """Return the projected gradient, sharded as what is stepped. Collective, every rank of the mesh, for a matrix.

    Args:
        entry: what trains.
        held: the columns of the basis that this very gradient has, [..., 1, r]; along the others there is nothing but
            rounding errors, which Adam would blow up to full steps.
    """
    assert entry.parameter.grad is not None
    like, basis = entry.stepped, entry.extra[PROJECTOR]
    is_matrix, tall = entry.parameter.dim() == 2, is_tall(entry.parameter.shape)
    # With parallel.offload=all what is stepped lies in host memory; the product is made where there is a device for it.
    device, place = computed_on(like), local_shard(like.detach()).device
    basis = whole(basis) if is_matrix and tall else local_shard(basis).to(device)
    rows = local_shard(entry.parameter.grad).to(device).float()
    part = projection.project(rows, basis if held is None else basis * held, tall)
    if not isinstance(like, DTensor) or tall or not is_matrix:
        return as_sharded(part.to(place), like, tuple(like.shape))
    # Of a wide matrix each rank has rows of both factors: a part of the sum over all rows.
    mesh = like.device_mesh
    sums = [Partial() if isinstance(placement, Shard) else Replicate() for placement in like.placements]
    summed = DTensor.from_local(part, mesh, sums, run_check=False).redistribute(mesh, like.placements)
    return as_sharded(local_shard(summed).to(place), like, tuple(like.shape))


def project_back(step: Tensor, projector: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's rows of the step in the parameter's own space. Collective for a matrix: every rank."""
    tall, is_matrix = is_tall(parameter.shape), parameter.dim() == 2
    own_step, own_projector = local_shard(step).to(computed_on(step)), local_shard(projector).to(computed_on(step))
    if tall:
        rows = own_step @ (whole(projector) if is_matrix else own_projector).mT
    else:
        rows = own_projector @ (whole(step) if is_matrix else own_step)
    return rows.to(local_shard(parameter).device)
