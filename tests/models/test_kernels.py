"""Kernels that run the blocks: which are chosen, what is refused, and Liger's against transformers' own numbers."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from lisa_dist.config import UserError
from lisa_dist.models import kernels
from lisa_dist.models.joined_linears import join_linears
from lisa_dist.models.kernels import LIGER_FAMILIES, choose_kernels, install_liger
from lisa_dist.runtime import distributed
from lisa_dist.sharding.ledger import Ledger
from tests.support.families import FAMILIES, meta_model, tiny_config

LIGER_ONES = [family for family in FAMILIES if tiny_config(family).model_type in LIGER_FAMILIES]


def test_auto_is_eager_without_a_gpu() -> None:
    assert choose_kernels("auto", meta_model("llama"), may_compile=True) == "eager"


@pytest.mark.parametrize(
    ("installed", "family", "may_compile", "chosen"),
    [
        (True, "llama", True, "liger"),
        (True, "gpt2", True, "compile"),
        (False, "llama", True, "compile"),
        (False, "llama", False, "eager"),
    ],
)
def test_auto_on_a_gpu_takes_what_was_measured_faster(
    installed: bool, family: str, may_compile: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(kernels, "has_liger", lambda: installed)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    model = meta_model(family)
    model._can_compile_fullgraph = True
    assert choose_kernels("auto", model, may_compile=may_compile) == chosen
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_kernels("auto", model, may_compile=True) == "eager"  # Triton needs the C compiler too


@pytest.mark.parametrize(
    ("installed", "device", "family", "wanted", "told"),
    [
        (False, "cuda", "llama", "liger", "0.8.5 or later; run pip install -U liger-kernel"),
        (True, "cpu", "llama", "liger", "needs a GPU; use model.kernels=eager"),
        (True, "cuda", "gpt2", "liger", "not known to fit model_type=gpt2, but llama, .*; use model.kernels=compile"),
        (True, "cpu", "llama", "compile", r"needs a C\+\+ compiler \(g\+\+ or clang\+\+\)"),
        (True, "cuda", "llama", "compile", r"needs a C compiler \(cc or gcc or clang\)"),
    ],
)
def test_kernels_that_can_not_run_are_refused_with_the_remedy(
    installed: bool, device: str, family: str, wanted: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    monkeypatch.setattr(kernels, "has_liger", lambda: installed)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=f"model.kernels={wanted}: .*{told}"):
        choose_kernels(wanted, meta_model(family), may_compile=True)


@pytest.mark.parametrize("family", LIGER_ONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_gives_the_numbers_of_transformers(family: str, dtype: torch.dtype, liger: None) -> None:
    """Float32 within rounding; bfloat16 as near to float32 as transformers' own, its gradient no less straight."""
    if dtype == torch.bfloat16 and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton's interpreter gives no numbers in bfloat16; tests/gpu compares there")
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in eager.parameters():  # norms' weights too, which begin at one or zero
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    exact = _loss_and_gradients(eager)
    fast = copy.deepcopy(eager).to(dtype)
    install_liger(fast, keep_inputs=True)
    found = _loss_and_gradients(fast)
    if dtype == torch.float32:
        assert found[0] == pytest.approx(exact[0], rel=1e-5)
        for name, gradient in exact[1].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    rounded = _loss_and_gradients(eager.to(dtype))
    assert abs(found[0] - exact[0]) <= abs(rounded[0] - exact[0]) + 5e-3 * exact[0]
    assert _cosine(found[1], exact[1]) > min(0.999, _cosine(rounded[1], exact[1]) - 5e-4)  # a router may choose anew


def test_layers_that_read_one_input_give_its_gradient_as_one_sum() -> None:
    """The numbers are those of each layer by itself; where one is of another kind none is joined."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, size, bias=size == 6, dtype=torch.float64) for size in (12, 6, 6)]
    layers[1].weight.requires_grad_(False)
    joined = copy.deepcopy(layers)
    assert join_linears(joined) and not join_linears([*layers[:2], nn.Identity()])
    given = [torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given[1].data.copy_(given[0].data)
    for hidden, own in zip(given, (layers, joined)):
        outputs = [layer(hidden) for layer in own]
        sum((output * place).square().sum() for place, output in enumerate(outputs, 1)).backward()
    torch.testing.assert_close(given[1].grad, given[0].grad)
    for one, other in zip(layers, joined):
        for parameter, same in zip(one.parameters(), other.parameters()):
            torch.testing.assert_close(same.grad, parameter.grad)
    with pytest.raises(AssertionError, match="one input"):
        joined[0](given[0]), joined[1](given[1])


def test_frozen_layers_that_are_joined_keep_no_input_and_sum_in_place() -> None:
    layers = [nn.Linear(32, 32, bias=False).requires_grad_(False) for _ in range(3)]
    join_linears(layers)
    saved: list[torch.Tensor] = []
    hidden = torch.randn(4, 32, requires_grad=True).mul(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda it: it):
        outputs = [layer(hidden) for layer in layers]
    assert [tensor.data_ptr() for tensor in saved] == [layer.weight.data_ptr() for layer in layers]
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.autograd.grad(outputs, hidden, [torch.ones_like(hidden)] * 3)
    counts = {event.key: event.count for event in recorded.key_averages()}
    assert (counts["aten::mm"], counts["aten::addmm_"]) == (1, 2)
    assert not {"aten::add", "aten::add_"} & set(counts)


def test_liger_is_put_on_one_model_alone(liger: None) -> None:
    patched, other = (AutoModelForCausalLM.from_config(tiny_config("llama")) for _ in range(2))
    forwards = {type(module): type(module).forward for module in other.modules()}
    install_liger(patched, keep_inputs=False)
    block, same = patched.model.layers[0], other.model.layers[0]
    assert type(block) is not type(same) and isinstance(block, type(same))
    for name in ("self_attn", "self_attn.q_proj", "mlp", "mlp.up_proj", "input_layernorm"):
        assert "forward" in vars(block.get_submodule(name)) and "forward" not in vars(same.get_submodule(name))
    assert forwards == {type(module): type(module).forward for module in other.modules()}


def _stand_in(operator: str) -> Any:
    """Return how to run it on two tensors of [2, 40, 6, 16]."""
    operators = kernels._simulated_operators()
    weight, angles = torch.empty(6 * 16, requires_grad=True), torch.empty(2, 40, 16)
    if operator.startswith("norm"):
        in_place = operator == "norm in place"
        return lambda hidden, _: operators.norm(hidden.flatten(2), weight, 1e-6, 0.0, "llama", in_place)
    if operator == "add norm":
        return lambda branch, residual: operators.add_norm(
            branch.flatten(2), residual.flatten(2), weight, 1e-6, 0.0, "llama"
        )
    if operator == "multiply":
        return lambda gate, up: operators.multiply["silu"](gate.flatten(2), up.flatten(2))
    return lambda query, key: operators.rotate(query.transpose(1, 2), key.transpose(1, 2), angles, angles)


# What the sources of liger-kernel 0.8.5 say, in passes over one tensor: a norm's gradient begins at zero unless it goes
# where the incoming one lies; those of a gated product take the places of its inputs; a rotation turns in place. This
# program's norm reads branch and residual, writes their sum and its norm, and keeps the sum.
@pytest.mark.parametrize(
    ("operator", "kept", "allocated", "moved"),
    [
        ("norm", 1, (1, 1), (2, 4)),
        ("norm in place", 1, (1, 0), (2, 3)),
        ("add norm", 1, (2, 0), (4, 4)),
        ("multiply", 2, (1, 0), (3, 5)),
        ("rotate", 0, (0, 0), (4, 4)),
    ],
)
def test_what_stands_in_for_liger_keeps_allocates_and_moves_as_much(
    operator: str, kept: int, allocated: tuple[int, int], moved: tuple[int, int]
) -> None:
    found: list[tuple[int, int]] = []
    saved: list[torch.Tensor] = []

    def watched(scope: str, act: Any) -> Any:
        ledger.phase = ledger.scope = scope
        before = ledger.live_bytes
        result = act()
        found.append((ledger.peaks.get(scope, before) - before, ledger.work[scope].other_bytes))
        return result

    with FakeTensorMode(), Ledger(1) as ledger:
        run = _stand_in(operator)
        inputs = [torch.empty(2, 40, 6, 16, requires_grad=True).mul(1) for _ in range(2)]
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda it: it):
            outputs = watched("forward", lambda: run(*inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        incoming = [torch.empty(2, 40, 6, 16).transpose(1, 2) if operator == "rotate" else torch.empty_like(outputs[0])]
        used = inputs[:1] if operator.startswith("norm") else inputs
        watched("backward", lambda: torch.autograd.grad(outputs, used, incoming * len(outputs)))
    size = inputs[0].nbytes
    small = size // 10  # a number a row, the norm's weight, sines and cosines
    assert sum(tensor.nbytes == size for tensor in saved) == kept
    assert [peak for peak, _ in found] == pytest.approx([passes * size for passes in allocated], abs=small)
    assert [moved for _, moved in found] == pytest.approx([passes * size for passes in moved], abs=small)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "qwen3"])
def test_what_stands_in_for_liger_keeps_what_its_kernels_keep(
    family: str, liger: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs Triton, to interpret Liger's kernels")
    pytest.importorskip("liger_kernel.ops", reason="needs liger-kernel")
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    simulated = copy.deepcopy(model)
    install_liger(model, keep_inputs=False)
    monkeypatch.setattr(distributed, "is_simulated", lambda: True)
    install_liger(simulated, keep_inputs=False)
    assert _kept_bytes(model) == _kept_bytes(simulated) > 0


def _kept_bytes(model: Any) -> int:
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.arange(40).view(2, 20))
    return sum(storage.nbytes() for storage in storages.values())


def _cosine(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    together = [torch.cat(list(gradients.values())) for gradients in (found, expected)]
    return F.cosine_similarity(*together, dim=0).item()


def _loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.arange(40).view(2, 20) * 7 % 120 + 3
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: parameter.grad.flatten().float().clone() for name, parameter in model.named_parameters()}
    return loss.item(), gradients


class _Number(float):
    """A float whose dtype may be set, as in a compiled kernel; Triton's interpreter gives plain ones."""

    def to(self, dtype: Any) -> _Number:
        return self


class _Overwritten(torch.autograd.Function):
    """What comes through, whose incoming gradient is of no use any more to anybody else."""

    @staticmethod
    def forward(ctx: Any, through: torch.Tensor) -> torch.Tensor:
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> torch.Tensor:
        kept = incoming[0].clone()
        incoming[0].fill_(torch.nan)
        return kept


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels by Triton's interpreter where both packages are; elsewhere what they compute, in plain torch."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("liger_kernel") is None:
        for name, contents in _stand_ins().items():
            monkeypatch.setitem(sys.modules, name, contents)
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter, "_implicit_cvt", lambda value: _Number(value) if type(value) is float else convert(value)
    )
    language = importlib.import_module("triton.language")
    # Functions of a GPU's own library, which the interpreter can't call.
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: language.math.rsqrt(x))
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", lambda x: 2 * language.sigmoid(2 * x) - 1)


def _stand_ins() -> dict[str, types.ModuleType]:
    def rms_norm(hidden: Any, weight: Any, epsilon: float, offset: float, casting: str, in_place: bool) -> Any:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        if casting == "llama":
            normed = (weight + offset) * normed.to(hidden.dtype)
        else:
            normed = ((weight.float() + offset) * normed).to(hidden.dtype)
        return _Overwritten.apply(normed) if in_place else normed

    def rotate(query: Any, key: Any, cos: Any, sin: Any, position_ids: Any = None, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        size = cos.shape[-1]

        def turn(states: Any) -> Any:
            turned, rest = states[..., :size], states[..., size:]
            first, second = turned.chunk(2, dim=-1)
            return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1).to(states.dtype)

        return turn(query), turn(key)

    def add_norm(branch: Any, residual: Any, *norm: Any) -> Any:
        total = residual if branch is None else residual + branch
        return total, rms_norm(total, *norm, True)

    contents: dict[str, dict[str, Any]] = {
        "lisa_dist.models.norm_kernel": {"AddNorm": _applied(add_norm)},
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.transformers": {},
        "liger_kernel.ops.geglu": {"LigerGELUMulFunction": _applied(lambda a, b: F.gelu(a, approximate="tanh") * b)},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _applied(lambda a, b: F.silu(a) * b)},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": _applied(rms_norm)},
        "liger_kernel.transformers.rope": {"liger_rotary_pos_emb": rotate},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name], __path__=[])
    return modules


def _applied(function: Any) -> Any:
    return types.SimpleNamespace(apply=function)
