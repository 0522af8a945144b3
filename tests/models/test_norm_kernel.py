"""The kernel that norms a residual stream and adds to it, by Triton's interpreter on the CPU."""

from __future__ import annotations

from tests.support.interpreted import run_interpreted

CODE = """
import itertools, torch
from lisa_dist.models.norm_kernel import ROWS, AddNorm

torch.manual_seed(0)
kinds = (("llama", 0.0), ("gemma", 1.0))
for (casting, offset), adds, trains in itertools.product(kinds, (False, True), (False, True)):
    rows, size = ROWS + 3, 12  # neither fills what is worked on at a time
    weight = torch.randn(size, requires_grad=trains)
    incoming = torch.randn(2, rows, size)
    results = []
    for is_kernel in (False, True):
        given = [torch.linspace(-1, 2, rows * size).view(rows, size).requires_grad_() for _ in range(2)]
        own = weight.detach().clone().requires_grad_(trains)
        branch, residual = (tensor.mul(place) for place, tensor in enumerate(given, 1))
        if is_kernel:
            total, normed = AddNorm.apply(branch if adds else None, residual, own, 1e-6, offset, casting)
        else:
            total = branch + residual if adds else residual
            normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6) * (own + offset)
        torch.autograd.backward([total, normed], [tensor.clone() for tensor in incoming])
        results.append([total, normed, *(tensor.grad for tensor in (*given, own))])
    for plain, kernel in zip(*results):
        assert (plain is None) == (kernel is None)
        assert plain is None or torch.allclose(plain, kernel, rtol=1e-4, atol=1e-5)
"""


def test_sums_norms_and_gradients_are_those_of_torch() -> None:
    run_interpreted(CODE)
