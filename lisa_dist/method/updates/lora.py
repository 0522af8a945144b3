"""LoRA adapters, put in by peft, and LoRA-FA's frozen first matrix."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.method.updates.base import OptimizedParam, Update
from lisa_dist.method.updates.sharded import keyed_generator, whole
from lisa_dist.models.layer_map import NORM, LayerMap, linear_layers, weights_read
from lisa_dist.models.quantization import count_weights
from lisa_dist.runtime.distributed import fill, local_shard
from lisa_dist.runtime.units import format_count

logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name for the only adapter
RIDGE = 1e-8  # added to A A^T before it is inverted (peft's LoRA-FA)


class Lora(Update):
    """LoRA (arXiv 2106.09685, equation 3): h = W x + s B A x, with W frozen and s = alpha / rank.

    peft makes the adapters and their forward (rsLoRA: s = alpha / sqrt(rank), arXiv 2312.03732; DoRA: arXiv
    2402.09353). They are put in on ``meta``, so that FSDP2 shards them like all else; A starts from peft's
    uniform Kaiming law, B from zero, both the same at any number of ranks. The base of a wrapped layer
    never trains; an adapter stays in the dtype of what trains while its block is frozen, so that no freeze rounds it.
    Fused experts of a mixture are no linear layers and get no adapters, which is said with their size.
    """

    def __init__(self, config: LoraUpdateConfig) -> None:
        self.config = config
        self.transposed: set[str] = set()  # the layers that hold their weight as [inputs, outputs]

    def prepare_model(self, model: nn.Module, layers: LayerMap) -> None:
        """Put adapters into the linear layers of every block.

        Raises:
            UserError: no layer has a name of ``update.target_modules``, or a matrix has a smaller rank than asked.
        """
        from peft import inject_adapter_in_model  # takes seconds to import

        self.transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        config = adapter_config(self.config, layers)
        # Into the stack by itself: of a whole model peft takes gate_proj, up_proj and down_proj for fused experts where
        # these were linear layers in transformers 4, though they are those of shared experts or of dense blocks.
        config.target_modules = config.target_modules.removeprefix(rf"{re.escape(layers.blocks_path)}\.")
        stack = model.get_submodule(layers.blocks_path)
        inject_adapter_in_model(config, stack, ADAPTER, low_cpu_mem_usage=True)

    def initialize(self, parameters: Mapping[str, nn.Parameter], added: list[str], seed: int) -> None:
        """Fill A at random, B with zeros, and DoRA's magnitudes with the norms of the base's rows.

        Collective: every rank, with DoRA (each base weight is gathered once, by itself).

        Raises:
            UserError: a base has a row of zeros, with DoRA.
        """
        for name in added:
            parameter = parameters[name]
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])  # Kaiming's with a = sqrt(5)
                full = torch.empty(parameter.shape)
                fill(parameter, full.uniform_(-bound, bound, generator=keyed_generator(seed, name)))
            elif ".lora_B." in name:
                local_shard(parameter.detach()).zero_()
            elif ".lora_magnitude_vector." in name:
                layer = name.partition(".lora_")[0]
                base = whole(parameters[f"{layer}.base_layer.weight"].detach()).float()
                norms = base.norm(dim=0 if layer in self.transposed else 1)
                if not norms.all():
                    raise UserError(
                        f"update.dora=true: {layer} has {int((norms == 0).sum())} rows of zeros, and what DoRA trains "
                        "is divided by the norm of a row, which is no number there; leave such layers out with "
                        "update.target_modules, or set update.dora=false"
                    )
                fill(parameter, norms)

    def trainable_parameters(self, names: list[str]) -> list[str]:
        """Return the adapters' names."""
        return [name for name in names if ".lora_" in name]

    def keeps_precision(self, name: str) -> bool:
        """Whether a parameter is an adapter that trains in some period."""
        return bool(self.trainable_parameters([name]))

    def describe_coverage(self, parameters: Mapping[str, nn.Parameter], layers: LayerMap) -> str:
        """Return how many of the model's parameters have adapters beside them, and which have not, by name."""
        sizes = {name: count_weights(name, parameter) for name, parameter in parameters.items()}
        base = {name: size for name, size in sizes.items() if size and ".lora_" not in name}
        without: dict[str, int] = {}
        for name, size in base.items():
            if not name.endswith(".base_layer.weight"):
                part = describe_part(name, parameters[name], layers)
                without[part] = without.get(part, 0) + size
        total = sum(base.values())
        left = sum(without.values())
        largest = sorted(without.items(), key=lambda item: -item[1])
        return (
            f"{format_count(total - left)} of the {format_count(total)} parameters have adapters; "
            f"{format_count(left)} ({left / total:.1%}) have none: "
            + ", ".join(f"{format_count(size)} in {part}" for part, size in largest)
        )

    @contextmanager
    def suppressed(self, block: nn.Module, factor: float) -> Iterator[None]:
        """Scale the adapters of a block by ``factor`` while the context lasts (IST's response suppression)."""
        adapters: list[Any] = [module for module in block.modules() if hasattr(module, "lora_A")]
        before = [adapter.scaling[ADAPTER] for adapter in adapters]
        for adapter, scaling in zip(adapters, before):
            adapter.scaling[ADAPTER] = scaling * factor
        try:
            yield
        finally:
            for adapter, scaling in zip(adapters, before):
                adapter.scaling[ADAPTER] = scaling


class LoraFa(Lora):
    """LoRA-FA (arXiv 2308.03303): A stays as it was drawn, so that only A x is kept for the backward pass.

    Adam sees g_B corrected to s^-2 g_B (A A^T + 1e-8 I)^+, the gradient of B whose step comes nearest to the
    full weight's (peft's ``LoraFAOptimizer``, https://github.com/huggingface/peft). A is stored like the frozen
    base. Unlike there, the product is made in fp32, and moments are torch's AdamW's.
    """

    def __init__(self, config: LoraUpdateConfig) -> None:
        super().__init__(config)
        self.adapters: dict[str, Any] = {}  # name of B -> the layer that holds both
        self.corrections: dict[str, Tensor] = {}  # name of B -> s^-2 (A A^T + ridge)^+, [rank, rank], fp32

    def prepare_model(self, model: nn.Module, layers: LayerMap) -> None:
        super().prepare_model(model, layers)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                self.adapters[f"{name}.lora_B.{ADAPTER}.weight"] = module

    def trainable_parameters(self, names: list[str]) -> list[str]:
        """Return the names of every B."""
        return [name for name in names if ".lora_B." in name]

    def transform_gradients(self, trained: Mapping[str, OptimizedParam]) -> None:
        """Correct the gradient of every B in place. Collective: every rank, at an adapter's first step."""
        for name, entry in trained.items():
            if name not in self.adapters or entry.parameter.grad is None:
                continue
            if name not in self.corrections:
                self.corrections[name] = self._correction(name)
            gradient = local_shard(entry.parameter.grad)
            gradient.copy_(gradient.float() @ self.corrections[name].to(gradient.device))

    def _correction(self, name: str) -> Tensor:
        layer = self.adapters[name]
        a = whole(layer.lora_A[ADAPTER].weight.detach()).float()
        ridge = RIDGE * torch.eye(a.shape[0], device=a.device)
        return torch.linalg.pinv(a @ a.T + ridge) / layer.scaling[ADAPTER] ** 2


def adapter_config(config: LoraUpdateConfig, layers: LayerMap) -> Any:
    """Return peft's description of the adapters for a model without them: what an exported adapter carries too.

    Raises:
        UserError: no layer has a name of ``update.target_modules``, one is read past its forward, or a matrix has a
            smaller rank than asked.
    """
    from peft import LoraConfig  # takes seconds to import

    found: dict[str, int] = {}  # path in the block -> its matrix's largest possible rank
    read: set[str] = set()  # paths of layers at which adapters may have no effect
    for block in layers.blocks:
        for name, layer in linear_layers(block).items():
            found[name] = min(*layer.weight.shape, found.get(name, layer.weight.numel()))
            parent, _, attribute = name.rpartition(".")
            if attribute in weights_read(type(block.get_submodule(parent))):  # type: ignore[arg-type]  # it has a hash
                read.add(name)
    chosen = {path: rank for path, rank in found.items() if is_chosen(path, config.target_modules)}
    if not config.target_modules:  # a gate with one output has no low rank
        chosen = {path: rank for path, rank in chosen.items() if rank > 1 and path not in read}
    for path in sorted(read & set(chosen)):
        raise UserError(
            f"update.target_modules: the model hands the weight of {path} to a kernel of its own, past an adapter, "
            "which would have no effect; leave it out"
        )
    known = sorted({path.rpartition(".")[2] for path in found})
    for target in config.target_modules:
        if not any(is_chosen(path, [target]) for path in found):
            raise UserError(
                f"update.target_modules={target}: the blocks of this model have no such linear layer, "
                f"but {', '.join(known) or 'none at all'}{nearest(target, known)}"
            )
    if not chosen:
        raise UserError("update=lora: the blocks of this model have no linear layers that could carry adapters")
    paths = "|".join(re.escape(path) for path in sorted(chosen))
    return LoraConfig(
        r=choose_rank(config, min(chosen.values())),
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=config.dropout,
        target_modules=rf"{re.escape(layers.blocks_path)}\.\d+\.(?:{paths})",
        fan_in_fan_out=all(isinstance(layer, Conv1D) for layer in linear_layers(layers.blocks[0]).values()),
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
    )


def merge(
    base: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Return the weight that acts as base and adapter together do, in fp32 (DoRA, arXiv 2402.09353, equation 5).

    Args:
        base: [outputs, inputs].
        a, b: [rank, inputs] and [outputs, rank].
        scaling: of their product.
        magnitude: DoRA's norms of the rows, [outputs].
        transposed: base is [inputs, outputs], as GPT-2 holds it.
    """
    merged = (base.float().T if transposed else base.float()) + scaling * (b.float() @ a.float())
    if magnitude is not None:
        merged *= (magnitude.float() / merged.norm(dim=1))[:, None]
    return merged.T if transposed else merged


def scaling_of(config: LoraUpdateConfig, rank: int) -> float:
    """Return what multiplies the product of the adapters."""
    return config.alpha / (math.sqrt(rank) if config.rslora else rank)


def describe_part(name: str, parameter: Tensor, layers: LayerMap) -> str:
    """Return what a parameter without an adapter belongs to, in a user's words."""
    part = layers.group_of(name)
    if not part.startswith("block:"):
        return "the modules around the blocks" if part == NORM else f"the {part}"
    path = layers.path_in_block(name)
    if parameter.dim() == 3 and "conv" not in path:
        return f"fused experts ({path})"
    if parameter.dim() == 2 and not path.endswith("bias"):
        return path.removesuffix(".weight")
    return "norms and biases"


def is_chosen(path: str, targets: list[str]) -> bool:
    """Whether a layer's path in its block ends in one of ``targets``; without targets every one is chosen."""
    return not targets or any(path == target or path.endswith(f".{target}") for target in targets)


def choose_rank(config: LoraUpdateConfig, largest: int) -> int:
    """Return the rank of all adapters, at most ``largest``, that of the smallest matrix.

    Raises:
        UserError: ``update.rank`` asks for more.
    """
    if config.rank is None:
        if config.preset_rank > largest:
            logger.info("adapters have rank %d, the largest that every matrix has, not %d", largest, config.preset_rank)
        return min(config.preset_rank, largest)
    if config.rank > largest:
        raise UserError(
            f"update.rank={config.rank}: must be at most {largest}, the rank of the smallest matrix that is adapted"
        )
    return config.rank
