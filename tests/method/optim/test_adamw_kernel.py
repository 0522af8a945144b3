"""AdamW's kernel for GPUs, by Triton's interpreter on the CPU, against torch's own fused step."""

from __future__ import annotations

from tests.support.interpreted import run_interpreted

CODE = """
import importlib, torch

adamw = importlib.import_module("lisa_dist.method.optim.adamw")
adamw._has_kernel = lambda parameter: True
for divisor, left_out in ((None, None), (7.0, None), (7.0, 2)):
    ended = []
    for kind in (torch.optim.AdamW, adamw.FusedAdamW):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(50, 101)), torch.nn.Parameter(torch.randn(3))]
        groups = [{"params": [parameter], "weight_decay": decay} for parameter, decay in zip(parameters, (0.1, 0.0))]
        optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for parameter in parameters:
            optimizer.state[parameter] = adamw.zero_state(optimizer, parameter)
        parameters[0].compute_copy = parameters[0].detach().half()
        for step in range(5):
            for parameter in parameters:
                parameter.grad = 3 * torch.randn_like(parameter)
            gradients = [parameter.grad.clone() for parameter in parameters]
            optimizer.grad_scale = None if divisor is None else torch.tensor(divisor)
            optimizer.found_inf = None if left_out is None else torch.tensor(float(step == left_out))
            optimizer.step()
            if kind is adamw.FusedAdamW:
                assert all(torch.equal(one.grad, gradient) for one, gradient in zip(parameters, gradients))
                assert torch.equal(parameters[0].compute_copy, parameters[0].detach().half())
                assert [id(one) for one in optimizer.copied] == [id(parameters[0])]
        ended.append([*parameters, *(tensor for one in parameters for tensor in optimizer.state[one].values())])
    for plain, kernel in zip(*ended, strict=True):
        assert torch.allclose(plain, kernel, rtol=1e-5, atol=2e-6)
    assert optimizer.state[parameters[0]]["step"] == (5 if left_out is None else 4)
"""


def test_steps_are_those_of_torch_and_gradients_stay() -> None:
    run_interpreted(CODE)
