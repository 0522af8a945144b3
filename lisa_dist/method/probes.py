"""What samplers want to know of the model: measured on the sharded model, reduced over ranks, returned as lists.

Every probe leaves parameters, gradients and random states as they were, runs without dropout, and gives every
rank the same numbers. A probe batch is one micro-batch of every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lisa_dist.config.sampling import ProbeRequest
from lisa_dist.data.batches import MicroBatch, up_to_last_label
from lisa_dist.method.updates import Update
from lisa_dist.models.matrices import InputSquares, input_dim
from lisa_dist.objectives import Objective
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_region, local_shard
from lisa_dist.sharding.activation_checkpointing import inputs_alone_kept
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.store import ParameterStore

logger = logging.getLogger(__name__)


def measure(
    request: ProbeRequest,
    store: ParameterStore,
    objective: Objective,
    update: Update,
    dims: ParallelDims,
    micro_batches: list[MicroBatch],
) -> list[float]:
    """Return what a sampler asked for. Collective: every rank, with the same request and equally many micro-batches."""
    return PROBES[request.kind](store, objective, update, dims, micro_batches, **request.settings)


def gradient_norms(
    store: ParameterStore, objective: Objective, update: Update, dims: ParallelDims, micro_batches: list[MicroBatch]
) -> list[float]:
    """Return for each block the mean over batches of sqrt(||g||^2 / N) (GRASS, arXiv 2604.07808).

    g is the gradient of a batch's mean loss with respect to the N parameters of the block that the update
    trains. Each is dropped in a hook as soon as its norm is known, so no more than one block's gradients exist
    at a time beside those of the modules that always train; and blocks keep their inputs alone, whatever the steps do,
    for the gradients of all blocks need more activations than those of a period. Collective: every rank, equally many
    micro-batches.
    """
    recomputed = [block for index, block in enumerate(store.layers.blocks) if not store.recomputes(index)]
    blocks = range(len(store.layers.blocks))
    names = [update.trainable_parameters(store.block_parameters(block)) for block in blocks]
    squares = torch.zeros(len(blocks), dtype=torch.float32, device=distributed.device())

    sums, batches = [0.0] * len(blocks), 0
    block_of = {id(store.parameter(name)): block for block in blocks for name in names[block]}

    def drop(parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares[block_of[id(parameter)]] += local_shard(parameter.grad).float().square().sum().to(squares.device)
        parameter.grad = None

    trained = (name for part in names for name in part)
    with store.also_trained(trained, drop), _evaluating(store.module), inputs_alone_kept(recomputed):
        for micro_batch in micro_batches:
            squares.zero_()
            loss_sum, divisor = objective(store.module, micro_batch)
            loss_sum.backward()
            for parameter in store.module.parameters():
                parameter.grad = None
            reduced = dims.all_reduce_sum([float(divisor), *squares.tolist()])
            whole, norms = max(reduced[0], 1.0), [math.sqrt(value / dims.replicate) for value in reduced[1:]]
            sums = [total + norm / whole for total, norm in zip(sums, norms)]
            batches += 1
    sizes = [sum(store.parameter(name).numel() for name in part) for part in names]
    return [total / (max(batches, 1) * math.sqrt(size)) for total, size in zip(sums, sizes)]


def weight_norms(
    store: ParameterStore, objective: Objective, update: Update, dims: ParallelDims, micro_batches: list[MicroBatch]
) -> list[float]:
    """Return for each block the l2 norm of all its parameters taken together. Collective: every rank."""
    squares = []
    for block in range(len(store.layers.blocks)):
        shards = [local_shard(store.parameter(name).detach()) for name in store.block_parameters(block)]
        squares.append(sum(float(shard.float().square().sum(dtype=torch.float64)) for shard in shards))
    return [math.sqrt(value / dims.replicate) for value in dims.all_reduce_sum(squares)]


@torch.no_grad()
def outlier_shares(
    store: ParameterStore,
    objective: Objective,
    update: Update,
    dims: ParallelDims,
    micro_batches: list[MicroBatch],
    threshold: float,
) -> list[float]:
    """Return for each block the share of entries of A_ij = ||X_j||_2 |W_ij| above ``threshold`` times their mean.

    OwLore's layerwise outlier distribution (arXiv 2405.18380): W are the block's weight matrices, all their entries
    taken together, X_j their j-th inputs over the tokens of all micro-batches, up to each sequence's last label; of a
    fused expert over the tokens that are routed to it. Collective: every rank, equally many micro-batches.
    """
    norms = _input_norms(store, objective, dims, micro_batches)
    shares = []
    for block in range(len(store.layers.blocks)):
        names = [name for name in store.block_parameters(block) if name in norms]
        entries = [_scaled_entries(store, name, norms[name]) for name in names]
        total, count = dims.all_reduce_sum(
            [sum(float(part.sum(dtype=torch.float64)) for part in entries), float(sum(p.numel() for p in entries))]
        )
        limit = threshold * total / max(count, 1)
        above = dims.all_reduce_sum([float(sum(int((part > limit).sum()) for part in entries))])[0]
        shares.append(above / max(count, 1))
    return shares


def suppressed_losses(
    store: ParameterStore,
    objective: Objective,
    update: Update,
    dims: ParallelDims,
    micro_batches: list[MicroBatch],
    sets: list[list[int]],
    factor: float,
) -> list[float]:
    """Return for each set of blocks the mean loss while the contribution of its blocks is scaled by ``factor``.

    IST's response suppression (arXiv 2410.11772): of adapters their product, otherwise what the block adds to the
    hidden states. Collective: every rank, equally many micro-batches.
    """
    losses = []
    for blocks in sets:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(update.suppressed(store.layers.blocks[block], factor))
            losses.append(mean_loss(store.module, objective, dims, micro_batches))
    return losses


# By the kind of a request; ``config.sampling.PROBE_KINDS`` says the same without torch.
PROBES: dict[str, Callable[..., list[float]]] = {
    "gradient_norms": gradient_norms,
    "outlier_shares": outlier_shares,
    "suppressed_losses": suppressed_losses,
    "weight_norms": weight_norms,
}


@torch.no_grad()
def mean_loss(
    module: nn.Module, objective: Objective, dims: ParallelDims, micro_batches: Iterable[MicroBatch]
) -> float:
    """Return the objective's mean loss over all ranks. Collective: every rank, equally many micro-batches."""
    loss_sum, divisor = torch.zeros((), device=distributed.device()), 0
    with _evaluating(module):
        for micro_batch in micro_batches:
            loss, counted = objective(module, micro_batch)
            loss_sum += loss
            divisor += counted
    total, whole = dims.all_reduce_sum([loss_sum.item(), float(divisor)])
    return total / max(whole, 1)


def _input_norms(
    store: ParameterStore, objective: Objective, dims: ParallelDims, micro_batches: Iterable[MicroBatch]
) -> dict[str, Tensor]:
    """Return for each weight matrix the l2 norm of each of its inputs over all tokens of all ranks.

    By the parameter's name: [inputs], of fused experts [experts, inputs].
    """
    seen = InputSquares(store.layers, distributed.device())
    with _evaluating(store.module), seen.watching():
        for micro_batch in micro_batches:
            seen.kept = up_to_last_label(micro_batch["labels"]).to(distributed.device())
            objective(store.module, micro_batch)
    if seen.unseen and distributed.is_main():
        left_out = ", ".join(sorted(seen.unseen))
        logger.warning("sampler=outlier: the inputs of %s can't be seen, so they are left out", left_out)
    norms = {}
    for name, squares in seen.squares.items():
        total = dims.all_reduce_sum(squares.flatten().tolist())
        norms[name] = torch.tensor(total, device=squares.device).view(squares.shape).sqrt()
    return norms


def _scaled_entries(store: ParameterStore, name: str, norms: Tensor) -> Tensor:
    """Return this rank's rows of ||X_j|| |W_ij|, in fp32."""
    weight = store.parameter(name).detach()
    rows = local_shard(weight).float().abs()
    module = store.module.get_submodule(name.rpartition(".")[0])
    factors = norms[..., :, None] if input_dim(module) == -2 else norms[..., None, :]
    return rows * factors.expand(weight.shape)[local_region(weight)].to(rows.device)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    module.eval()
    try:
        yield
    finally:
        module.train()
