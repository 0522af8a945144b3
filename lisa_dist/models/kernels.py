"""Which kernels run a model's blocks: transformers' own operators, Liger's, or what torch.compile makes of them.

Liger's (arXiv 2410.10989) are put on the instances of one model: its classes, and other models, stay as they were.
In a simulation, whose tensors have no values, operators that keep and move as many bytes stand in for them.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from packaging.version import Version
from torch import Tensor, nn

from lisa_dist.config import UserError
from lisa_dist.models.joined_linears import join_linears
from lisa_dist.models.simulated_kernels import SimulatedAddNorm, SimulatedMultiply, SimulatedNorm, SimulatedRotation
from lisa_dist.runtime import distributed

LIGER = "0.8.5"  # earlier ones turn all of a head whose rotary embedding is partial (Liger's pull request 1451)
ROTARY = "apply_rotary_pos_emb"  # what the modules of transformers call their rotary embedding
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # that read one input, in the order of their calls
# All that the forward pass of a block names which is norm, attention, sum, norm, MLP, sum.
PLAIN_BLOCK = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass(frozen=True)
class _Family:
    """What Liger's kernels must be told of an architecture."""

    offset: float = 0.0  # a norm multiplies by its weight + offset
    casting: str = "llama"  # where a norm goes back from float32: before its weight (llama), after it (gemma)
    gate: str | None = "silu"  # the activation of the gate; None: its MLPs are of another kind
    joined: bool = False  # gate and up are one linear layer
    norms_last: bool = False  # norms of what is added to a residual: their gradient is the residual's too


_GEMMA = _Family(offset=1.0, casting="gemma", gate="gelu")
_GEMMA_2 = replace(_GEMMA, norms_last=True)
LIGER_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "phi3": _Family(joined=True),
    "olmo2": _Family(casting="gemma", norms_last=True),
    "gemma": _GEMMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "mixtral": _Family(gate=None),
    "qwen3_moe": _Family(gate=None),
}
_GATES = {"silu": ("silu", "swish"), "gelu": ("gelu_pytorch_tanh",)}


def choose_kernels(wanted: str, model: nn.Module, *, may_compile: bool) -> str:
    """Return what ``model.kernels`` comes to: ``eager``, ``liger`` or ``compile``.

    ``auto`` takes what docs/performance.md found faster: on a CPU ``eager``; on a GPU with a C compiler ``liger`` where
    the package is installed and knows the architecture, else ``compile`` where that is known to work, else ``eager``.
    A simulation is of a GPU, on a machine that has a compiler.

    Args:
        wanted: ``model.kernels``.
        model: the causal language model, as transformers builds it.
        may_compile: whether the rest of the configuration was ever run compiled.

    Raises:
        UserError: what is wanted can't run here, or not with this model.
    """
    simulated = distributed.is_simulated()
    on_gpu = simulated or distributed.device().type == "cuda"
    missing = None if simulated else missing_for_compiling(on_gpu)
    if wanted == "liger":
        _check_liger(model, on_gpu)
    if wanted == "compile" and missing:
        raise UserError(f"model.kernels=compile: needs {missing}; install one, or use model.kernels=eager")
    if wanted != "auto":
        return wanted
    if on_gpu and has_liger() and knows_liger(model) and not missing:
        return "liger"
    compiles = may_compile and getattr(model, "_can_compile_fullgraph", False) and not missing
    return "compile" if on_gpu and compiles else "eager"


def knows_liger(model: nn.Module) -> bool:
    """Whether Liger's kernels are known to fit the architecture of ``model``."""
    return _family_of(model) is not None


def has_liger() -> bool:
    """Whether the package with Liger's kernels is installed, in a version that rotates partial heads rightly."""
    try:
        return Version(metadata.version("liger-kernel")) >= Version(LIGER)
    except metadata.PackageNotFoundError:
        return False


@functools.cache
def has_triton() -> bool:
    """Whether this program's own kernels run on a GPU: Triton, and the C compiler by which it starts what it makes."""
    return importlib.util.find_spec("triton") is not None and missing_for_compiling(on_gpu=True) is None


def loss_in_place(kernels: str) -> bool:
    """Whether a kernel of this device may turn logits into their gradient: Triton comes with torch for GPUs."""
    if kernels == "eager":
        return False
    return distributed.is_simulated() or (distributed.device().type == "cuda" and has_triton())


def missing_for_compiling(on_gpu: bool) -> str | None:
    """Return the compiler that torch.compile needs here and that is not found, in words; None where there is one."""
    variable, names = ("CC", ("cc", "gcc", "clang")) if on_gpu else ("CXX", ("g++", "clang++"))
    own = [os.environ[variable]] if os.environ.get(variable) else []
    if any(shutil.which(name) for name in (*own, *names)):
        return None
    return f"a {'C' if on_gpu else 'C++'} compiler ({' or '.join(names)})"


def install_liger(model: nn.Module, *, keep_inputs: bool) -> None:
    """Let Liger's kernels run the norms, gated MLPs and rotary embedding of ``model``, which its family allows.

    In blocks of the usual form a kernel of this program runs the norms, with the residual's sums, and the gradients of
    linear layers that read one input are one sum: neither changes what is computed but by rounding.

    Call it before the model is sharded, on any device; the kernels need a GPU. The loss stays the chunked head's. In a
    simulated world stand-ins run.

    Args:
        model: a causal language model of :data:`LIGER_FAMILIES`, maybe with adapters in it.
        keep_inputs: copy what the rotary embedding turns in place, for checkpointing that keeps products by value.
    """
    family = _family_of(model)
    assert family is not None, "choose_kernels takes Liger for the families that it knows"
    operators = _simulated_operators() if distributed.is_simulated() else _liger_operators()
    plain_block = functools.cache(functools.partial(_plain_block, family, operators.add_norm))

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if keep_inputs:
            query, key = query.clone(), key.clone()
        return operators.rotate(query, key, cos, sin, *args, **kwargs)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module, family, operators.norm)  # type: ignore[method-assign]
        elif family.gate is not None and type(module).__name__.endswith("MLP") and _has_gate(module, family):
            module.forward = _mlp(module, family, operators.multiply[family.gate])  # type: ignore[method-assign]
        elif ROTARY in inspect.unwrap(type(module).forward).__code__.co_names:
            module.forward = types.MethodType(  # type: ignore[method-assign]
                _with_global(type(module).forward, ROTARY, rotate), module
            )
        if inspect.unwrap(type(module).forward).__code__.co_names == PLAIN_BLOCK:
            # Of its class, for transformers 5.18 and later checkpoint activations in the forward that a class has.
            module.__class__ = plain_block(type(module))  # type: ignore[arg-type]
        for names in JOINED:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Module) for layer in layers):
                join_linears([layer for layer in layers if layer is not None])


@dataclass(frozen=True)
class _Operators:
    norm: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]  # of a branch, if any, and a residual: their sum and its norm
    multiply: dict[str, Callable[[Tensor, Tensor], Tensor]]  # by the activation of the first
    rotate: Callable[..., Any]


def _liger_operators() -> _Operators:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    from lisa_dist.models.norm_kernel import AddNorm  # Triton is there where Liger is

    multiply = {"silu": LigerSiLUMulFunction.apply, "gelu": LigerGELUMulFunction.apply}
    return _Operators(LigerRMSNormFunction.apply, AddNorm.apply, multiply, liger_rotary_pos_emb)


def _simulated_operators() -> _Operators:
    multiply = dict.fromkeys(_GATES, SimulatedMultiply.apply)
    return _Operators(SimulatedNorm.apply, SimulatedAddNorm.apply, multiply, SimulatedRotation.apply)


def _check_liger(model: nn.Module, on_gpu: bool) -> None:
    if not has_liger():
        raise UserError(
            f"model.kernels=liger: needs the package liger-kernel, {LIGER} or later; run pip install -U liger-kernel"
        )
    if not on_gpu:
        raise UserError("model.kernels=liger: needs a GPU; use model.kernels=eager or compile")
    if not knows_liger(model):
        architecture: Any = model.config
        raise UserError(
            f"model.kernels=liger: is not known to fit model_type={architecture.model_type}, but "
            f"{', '.join(LIGER_FAMILIES)}; use model.kernels=compile or eager"
        )


def _family_of(model: nn.Module) -> _Family | None:
    # Code that comes with a model may name a family, and compute something else.
    ours = type(model).__module__.startswith("transformers.models.")
    architecture: Any = model.config
    return LIGER_FAMILIES.get(architecture.model_type) if ours else None


def _norm(module: Any, family: _Family, apply: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        return apply(hidden, module.weight, _epsilon(module), family.offset, family.casting, not family.norms_last)

    return forward


def _epsilon(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _plain_block(
    family: _Family, add_norm: Callable[..., tuple[Tensor, Tensor]], kind: type[nn.Module]
) -> type[nn.Module]:
    def apply(branch: Tensor | None, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        return add_norm(branch, residual, norm.weight, _epsilon(norm), family.offset, family.casting)

    def forward(block: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual, normed = apply(None, hidden_states, block.input_layernorm)
        attended, _ = block.self_attn(hidden_states=normed, **kwargs)
        residual, normed = apply(attended, residual, block.post_attention_layernorm)
        return residual + block.mlp(normed)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _has_gate(module: Any, family: _Family) -> bool:
    """Whether an MLP is gated by the activation that the family has unless a configuration changes it."""
    activation = getattr(module.config, "hidden_activation", None) or module.config.hidden_act
    return activation in _GATES[str(family.gate)]


def _mlp(module: Any, family: _Family, multiply: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def split(hidden: Tensor) -> tuple[Tensor, ...]:
        if family.joined:
            return module.gate_up_proj(hidden).chunk(2, dim=-1)
        return module.gate_proj(hidden), module.up_proj(hidden)

    return lambda hidden: module.down_proj(multiply(*split(hidden)))


def _with_global(function: Any, name: str, value: Any) -> Callable[..., Any]:
    """Return ``function`` with another value of one of the globals that it uses; decorators are left out."""
    original = inspect.unwrap(function)
    replaced = types.FunctionType(
        original.__code__,
        {**original.__globals__, name: value},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    replaced.__kwdefaults__ = original.__kwdefaults__
    return functools.update_wrapper(replaced, original)
