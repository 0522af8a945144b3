"""Bases of gradients, and moments that go along when a basis changes: on plain tensors."""

from __future__ import annotations

import pytest
import torch

from lisa_dist.method.updates import OptimizedParam
from lisa_dist.method.updates.low_rank import PROJECTOR, refresh_experts
from lisa_dist.method.updates.projection import find_basis, noise_columns, project, turn_moment

RANK = 5


def decaying(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall like those of gradients, by 0.9 each."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(size, 24, generator=generator)).Q for size in (rows, columns))
    return left @ (0.9 ** torch.arange(24.0)).diag() @ right.T


def noise(smaller: int, rank: int = RANK) -> torch.Tensor:
    return torch.randn(smaller, noise_columns(rank, smaller), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(70, 40), (40, 70)])
def test_the_randomised_basis_captures_what_the_exact_one_does(shape: tuple[int, int]) -> None:
    gradient, tall = decaying(*shape), shape[0] >= shape[1]
    exact, _ = find_basis(gradient, RANK, noise(40))
    nothing = torch.zeros(40, RANK)
    found, _ = find_basis(gradient, RANK, noise(40), start=nothing)
    assert torch.linalg.svdvals(exact.T @ found).min() > 0.999  # the cosine of the largest angle between them
    captured = project(gradient, found, tall).norm() ** 2 / project(gradient, exact, tall).norm() ** 2
    assert 0.9999 < captured <= 1 + 1e-5  # fp32 rounding
    # From the basis of a similar gradient it is found more exactly still.
    moved = gradient + 0.01 * decaying(*shape, seed=2)
    exact, _ = find_basis(moved, RANK, noise(40))
    again, _ = find_basis(moved, RANK, noise(40), start=found)
    assert torch.linalg.svdvals(exact.T @ again).min() > 0.9999


@pytest.mark.parametrize("start", [None, torch.zeros(40, RANK)])
def test_directions_that_a_gradient_does_not_have_are_random_and_the_same_in_spite_of_rounding(
    start: torch.Tensor | None,
) -> None:
    first, second = torch.randn(2, 70, 2), torch.randn(2, 2, 40)
    gradients = first @ second  # rank 2, below the five columns
    basis, held = find_basis(gradients, RANK, noise(40), start)
    assert held[:, 0].tolist() == [[1, 1, 0, 0, 0]] * 2
    assert torch.allclose(basis.mT @ basis, torch.eye(RANK).expand(2, -1, -1), atol=1e-5)
    rounded, _ = find_basis(gradients * (1 + 1e-7 * torch.randn(70, 40)), RANK, noise(40), start)
    assert torch.allclose(basis, rounded, atol=1e-4)
    empty, held = find_basis(torch.zeros(70, 40), RANK, noise(40), start)
    assert not held.any() and torch.allclose(empty.T @ empty, torch.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("tall", [True, False])
def test_a_step_does_not_depend_on_the_signs_of_singular_vectors(tall: bool) -> None:
    old, new = (find_basis(decaying(70, 40, seed), RANK, noise(40))[0] for seed in (0, 1))
    moments = (torch.randn(70, RANK), torch.rand(70, RANK))

    def step(new: torch.Tensor) -> torch.Tensor:
        """Adam's direction after both moments are carried over, in the space of the weights."""
        first, second = (
            turn_moment(moment if tall else moment.T, old.T @ new, tall, squared)
            for moment, squared in zip(moments, (False, True))
        )
        direction = first / (second.sqrt() + 1e-8)
        return direction @ new.T if tall else new @ direction

    flipped = new * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    assert torch.allclose(step(new), step(flipped), atol=1e-6)
    assert not torch.allclose(step(new), step(new.flip(-1)), atol=1e-2)  # the order does count, outside the old basis


def test_moments_go_with_their_directions_and_no_second_moment_vanishes() -> None:
    basis, _ = find_basis(decaying(70, 40), RANK, noise(40))
    first, second = torch.randn(70, RANK), torch.rand(70, RANK)
    order = [3, 0, 4, 1, 2]
    overlap = basis.T @ basis[:, order]
    assert torch.allclose(turn_moment(first, overlap, True, False), first[:, order], atol=1e-5)
    assert torch.allclose(turn_moment(second, overlap, True, True), second[:, order], atol=1e-5)
    # A basis at right angles to the old one has no mean, and the variance that stood in its place.
    nothing = torch.zeros(RANK, RANK)
    assert not turn_moment(first, nothing, True, False).any()
    assert torch.equal(turn_moment(second, nothing, True, True), second)


def test_an_expert_without_tokens_keeps_its_projector_or_gets_one_at_its_first_tokens() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 12, 8))
    entry = OptimizedParam(
        parameter, torch.nn.Parameter(torch.zeros(3, 12, RANK)), {PROJECTOR: torch.zeros(3, 8, RANK)}
    )
    parameter.grad = torch.randn(3, 12, 8)
    parameter.grad[1] = 0
    refresh_experts("experts", entry, "svd", due=True)
    bases = entry.extra[PROJECTOR].clone()
    assert bases[0].any() and not bases[1].any() and bases[2].any() and entry.turn_moment is None
    entry.step = 1
    parameter.grad = torch.randn(3, 12, 8)
    refresh_experts("experts", entry, "svd", due=False)
    late = entry.extra[PROJECTOR].clone()
    assert torch.equal(late[[0, 2]], bases[[0, 2]]) and torch.allclose(late[1].T @ late[1], torch.eye(RANK), atol=1e-5)
    assert entry.turn_moment is None and refresh_experts("experts", entry, "svd", due=False) is None
    entry.step = 4
    parameter.grad = torch.randn(3, 12, 8)
    parameter.grad[0] = 0
    refresh_experts("experts", entry, "svd", due=True)
    assert torch.equal(entry.extra[PROJECTOR][0], late[0]) and not torch.equal(entry.extra[PROJECTOR][1], late[1])
    assert entry.turn_moment is not None
    moment = torch.randn(3, 12, RANK)
    assert torch.equal(entry.turn_moment(moment, False)[0], moment[0])
