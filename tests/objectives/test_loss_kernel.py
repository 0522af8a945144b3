"""The kernel that puts the loss's gradient where the logits were, by Triton's interpreter on the CPU."""

from __future__ import annotations

from tests.support.interpreted import run_interpreted

CODE = """
import itertools, torch
from torch.nn.functional import cross_entropy
from lisa_dist.objectives.chunked_cross_entropy import ChunkedCrossEntropy, LogitTransform
from lisa_dist.objectives.loss_kernel import COLUMNS, cross_entropy_in_place, multiply_in_place

torch.manual_seed(0)
for dtype, (scale, cap), words in itertools.product(
    (torch.float32, torch.bfloat16), ((1.0, None), (0.25, None), (0.5, 3.0)), (100, COLUMNS + 9)
):
    logits = (4 * torch.randn(6, words)).to(dtype)
    logits[0] = 0.0
    logits[0, 3] = 12.0  # nearly sure, and right: p - 1 must keep its digits
    targets = torch.randint(0, words, (6,))
    targets[0], targets[2] = 3, -100
    exact = logits.double().requires_grad_()
    values = exact * scale if cap is None else cap * torch.tanh(exact * scale / cap)
    expected = cross_entropy(values, targets, reduction="none")
    expected.sum().backward()
    kept, replaced = logits.clone(), logits.clone()
    losses = cross_entropy_in_place(replaced, targets, scale, cap, True)
    assert torch.equal(losses, cross_entropy_in_place(kept, targets, scale, cap, False)) and torch.equal(kept, logits)
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert losses[2] == 0 and not replaced[2].any()
    error = (replaced.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1).clamp_min(1e-30)
    assert error.max() < (0.01 if dtype == torch.bfloat16 else 1e-3), error

hidden = torch.randn(37, 16)
results = []
for in_place in (False, True):
    given = hidden.clone().requires_grad_()
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 16 * 50).view(50, 16))
    bias = torch.nn.Parameter(torch.ones(50))
    targets = torch.arange(37) % 50
    targets[::3] = -100
    loss = ChunkedCrossEntropy.apply(given, weight, bias, targets, LogitTransform(), 10, in_place, True)
    (loss * 0.5).backward()
    results.append([loss.detach(), given.grad, weight.grad, bias.grad])
for plain, kernel in zip(*results):
    assert torch.allclose(plain, kernel, rtol=1e-4, atol=1e-5)

tensor = torch.randn(2 * COLUMNS + 5)
multiplied = tensor.clone()
multiply_in_place(multiplied, torch.tensor(1.0))
assert torch.equal(multiplied, tensor)
multiply_in_place(multiplied, torch.tensor(0.5))
assert torch.equal(multiplied, tensor * 0.5)
"""


def test_losses_and_gradients_are_those_of_torch() -> None:
    run_interpreted(CODE)
