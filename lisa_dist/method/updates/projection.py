"""The mathematics of low-rank projected gradients, on plain tensors.

A gradient is [..., m, n]: leading dimensions count matrices that are independent of each other, such as fused experts.
A *basis* is [..., min(m, n), r] with orthonormal columns, in the space of the smaller side; a projected gradient is
[..., m, r] where m >= n ("tall"), else [..., r, n].
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 16  # columns that the randomised search takes along beside those that are asked for
POWER_ITERATIONS = 2  # products with G^T G of the randomised search


def is_tall(shape: tuple[int, ...]) -> bool:
    """Whether the right side of a matrix is projected."""
    return shape[-2] >= shape[-1]


def find_basis(gradient: Tensor, rank: int, noise: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the first ``rank`` singular vectors of the smaller side of gradients, and which are theirs.

    A gradient of fewer tokens than ``rank``, or of none, has fewer directions above the rounding errors. What an SVD
    returns for the rest is made of these errors, another at every number of ranks, so random directions that are
    orthogonal to the found ones stand there instead. The sign of a column is that of its largest element.

    Args:
        gradient: [..., m, n], fp32.
        rank: r, at most min(m, n).
        noise: [min(m, n), at least r] normally distributed numbers, the same wherever the result must be.
        start: a basis of an earlier gradient, [..., min(m, n), r], from which a subspace iteration starts; None: an
            exact SVD is made.

    Returns:
        the basis [..., min(m, n), r], and [..., 1, r]: 1 for the columns that the gradient has, 0 for the random ones.
    """
    tall = gradient if is_tall(gradient.shape) else gradient.mT
    if start is None:
        _, values, vectors = torch.linalg.svd(tall, full_matrices=False)
        basis, values = vectors.mT[..., :rank], values[..., :rank]
    else:
        basis, values = _iterate(tall, rank, noise, start)
    limit = values[..., :1] * max(gradient.shape[-2:]) * torch.finfo(values.dtype).eps
    held = (values > limit)[..., None, :]
    completed = torch.linalg.qr(torch.where(held, basis, noise[..., :rank])).Q
    basis = torch.where(held, basis, completed)
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return basis * largest.sign(), held.to(basis.dtype)


def _iterate(tall: Tensor, rank: int, noise: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return approximate right singular vectors and values (Halko, Martinsson, Tropp, arXiv 0909.4061, 4.3 to 5.1).

    The old basis makes the search short, the random columns beside it find what is new.
    """
    old = start.any(-1, keepdim=True).any(-2, keepdim=True)
    first = torch.where(old, start, noise[..., :rank])
    sought = torch.cat([first, noise[..., rank:].expand(*first.shape[:-1], -1)], -1)
    for _ in range(POWER_ITERATIONS):
        sought = torch.linalg.qr(tall.mT @ torch.linalg.qr(tall @ sought).Q).Q
    thin = tall.mT @ torch.linalg.qr(tall @ sought).Q
    vectors, values, _ = torch.linalg.svd(thin, full_matrices=False)
    return vectors[..., :rank], values[..., :rank]


def noise_columns(rank: int, smaller: int) -> int:
    """Return how many random columns :func:`find_basis` can use."""
    return min(rank + OVERSAMPLING, smaller)


def project(gradient: Tensor, basis: Tensor, tall: bool) -> Tensor:
    """Return gradients in their bases; of a wide one, some rows with those of its basis give a part of a sum."""
    return gradient @ basis if tall else basis.mT @ gradient


def turn_moment(moment: Tensor, overlap: Tensor, tall: bool, squared: bool) -> Tensor:
    """Return a moment of projected gradients as it is in a new basis.

    The first moment is linear in the gradient: M P_old^T P_new (tall) or P_new^T P_old M. The second is carried by the
    squares of the same numbers, as the variance of a sum of uncorrelated terms is. It has to go along: a direction that
    was the first and is the tenth now would otherwise have the first's mean over the tenth's variance, and make steps
    many times too long. The share of a new direction that is outside the old basis has no history. It gets the second
    moment of the old direction in its place: with none, the first steps would be three times too long.

    Args:
        moment: [..., m, r] or [..., r, n].
        overlap: P_old^T P_new, [..., r, r].
        tall: whether it is [..., m, r].
        squared: whether it is the second moment.
    """
    rows = moment if tall else moment.mT
    if squared:
        shares = overlap.square()
        new = (1 - shares.sum(-2, keepdim=True)).clamp(min=0)
        turned = rows @ shares + rows * new
    else:
        turned = rows @ overlap
    return turned if tall else turned.mT
