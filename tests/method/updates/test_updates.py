"""What an update puts into a model and names as trainable, and the mistakes it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.checkpoint.adapters import put_in_by_peft
from lisa_dist.config import UpdateConfig, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.updates import UPDATE_CONFIGS, LoraUpdateConfig, LowRankUpdateConfig
from lisa_dist.method.updates import Update, build_update
from lisa_dist.method.updates.lora import adapter_config
from lisa_dist.method.updates.low_rank import LowRank
from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.quantization import quantize_linears
from tests.support.families import FAMILIES, tiny_config

# of the paper or its code: sampler, update, and what else the preset sets
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lisa": ("uniform", "full_rank", {"sampler.active_layers": 2, "sampler.period": 20, "always_active.head": True}),
    "lisa_lean": ("uniform", "full_rank", {"sampler.non_block_modules": True, "always_active.embeddings": False}),
    "full": ("all", "full_rank", {"always_active.embeddings": True}),
    "lora": ("all", "lora", {"always_active.embeddings": False, "always_active.head": False}),
    "lora_fa": ("all", "lora_fa", {"always_active.norm": False}),
    "galore": (
        "all",
        "low_rank",
        {"update.preset_rank": 128, "update.refresh_every": 200, "update.scale": 4.0, "optimizer.lr": 3e-5},
    ),
    "grass": ("gradient", "full_rank", {"sampler.period": 25}),
    "owlore": ("outlier", "low_rank", {"sampler.active_layers": 5, "sampler.period": 50, "update.preset_rank": 256}),
    "ist": ("importance", "lora", {"sampler.suppression_factor": 0.25, "sampler.active_layers": None}),
    "badam": ("sweep", "full_rank", {"sampler.active_layers": 1, "sampler.order": "descending", "optimizer.lr": 1e-6}),
}


def prepared(config: UpdateConfig, family: str = "llama") -> tuple[Update, nn.Module, list[str]]:
    """The update, the model it prepared on meta, and the parameter names of the first block."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    layers = find_layers(model)
    update = build_update(config)
    update.prepare_model(model, layers)
    return update, model, [name for name, _ in model.named_parameters() if layers.group_of(name) == "block:0"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_is_a_named_pair(method: str) -> None:
    config = load(["model.path=a/model", f"method={method}"])
    sampler, update, settings = METHODS[method]
    assert (config.method, config.sampler.name, config.update.name) == (method, sampler, update)
    for key, value in settings.items():
        group, name = key.split(".")
        assert getattr(getattr(config, group), name) == value, key


def test_any_other_pair_is_an_override() -> None:
    config = load(["method=lora", "sampler=uniform", "sampler.active_layers=3"])
    assert (config.sampler.name, config.sampler.active_layers, config.update.name) == ("uniform", 3, "lora")


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_into_the_blocks_of_every_family(family: str) -> None:
    update, model, names = prepared(LoraUpdateConfig(rank=2), family)
    trained = update.trainable_parameters(names)
    assert trained and all(".lora_" in name for name in trained)
    assert {name.split(".lora_")[1].split(".")[0] for name in trained} == {"A", "B"}
    everywhere = [name for name, _ in model.named_parameters() if ".lora_" in name]
    layers = find_layers(model)
    assert {layers.group_of(name).split(":")[0] for name in everywhere} == {"block"}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_linear_layers_beside_fused_experts_get_adapters_which_peft_would_put_elsewhere() -> None:
    """peft takes their names for those of experts; such adapters are exported merged alone."""
    for family, agrees in (("glm4_moe", False), ("llama", True)):
        _, model, _ = prepared(LoraUpdateConfig(rank=2), family)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(tiny_config(family))
        written = adapter_config(LoraUpdateConfig(rank=2), find_layers(plain))
        ours = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert (ours == put_in_by_peft(written, plain)) is agrees
        shared = {name.split(".lora_")[0].rpartition(".")[2] for name in ours if "layers.1.mlp.shared_experts" in name}
        assert agrees or shared == {"gate_proj", "up_proj", "down_proj"}


def test_layers_of_which_parts_are_read_where_that_is_asked_for_get_adapters() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=1, vocab_size=64)
        model = AutoModelForCausalLM.from_config(config)
    adapter_config(LoraUpdateConfig(rank=2, target_modules=["dense", "dense_4h_to_h"]), find_layers(model))


def test_layers_whose_weights_go_to_a_kernel_get_no_adapters() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64)
        model = AutoModelForCausalLM.from_config(config)
    layers = find_layers(model)
    with pytest.raises(UserError, match=r"update\.target_modules: .* hands the weight of mixer\.out_proj to a kernel"):
        adapter_config(LoraUpdateConfig(rank=2, target_modules=["in_proj", "out_proj"]), layers)
    build_update(LoraUpdateConfig(rank=2)).prepare_model(model, layers)
    adapted = {
        name.split(".lora_")[0].split("layers.0.")[-1] for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert {name for name in adapted if "layers.1" not in name} == {"mixer.in_proj"}


def test_dora_refuses_rows_of_zeros_which_it_would_divide_by() -> None:
    """As of Qwen 3.6's layers of linear attention: the first loss was no number."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    layer = model.model.layers[1].self_attn.o_proj.weight
    layer.data[3:5] = 0.0
    update = build_update(LoraUpdateConfig(rank=2, dora=True))
    update.prepare_model(model, find_layers(model))
    parameters = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_meta}
    parameters |= {n: nn.Parameter(torch.empty(p.shape)) for n, p in model.named_parameters() if p.is_meta}
    added = [name for name in parameters if ".lora_" in name]
    with pytest.raises(UserError, match=r"layers.1.self_attn.o_proj has 2 rows of zeros.*update.dora=false"):
        update.initialize(parameters, added, 0)
    layer.data[3:5] = 0.1
    update.initialize(parameters, added, 0)


def test_lora_fa_trains_the_second_matrix_alone() -> None:
    config = load(["method=lora_fa"]).update
    update, _, names = prepared(config)
    assert {name.split(".lora_")[1] for name in update.trainable_parameters(names)} == {"B.default.weight"}


def test_target_modules_choose_layers() -> None:
    update, _, names = prepared(LoraUpdateConfig(target_modules=["q_proj", "mlp.up_proj"]))
    layers = {name.split(".lora_")[0].split("layers.0.")[1] for name in update.trainable_parameters(names)}
    assert layers == {"self_attn.q_proj", "mlp.up_proj"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraUpdateConfig(target_modules=["q_porj"]), "update.target_modules=q_porj: .*did you mean q_proj"),
        (LoraUpdateConfig(rank=25), "update.rank=25: must be at most 24"),  # k_proj is [24, 48]
        (LowRankUpdateConfig(rank=49), "update.rank=49: must be at most"),
    ],
)
def test_mistakes_are_one_sentence(config: UpdateConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(config)


@pytest.mark.parametrize("config", [LoraUpdateConfig(preset_rank=999), LowRankUpdateConfig(preset_rank=999)])
def test_the_rank_of_a_preset_is_cut_to_the_matrix_and_said_once(config: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="lisa_dist"):
        update, model, _ = prepared(config)
    assert len([record for record in caplog.records if "rank" in record.getMessage()]) == 1
    if isinstance(update, LowRank):
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert "model.layers.0.self_attn.q_proj.weight" in update.ranks
        assert all(rank == min(shapes[name]) for name, rank in update.ranks.items())
    else:
        assert model.model.layers[0].self_attn.q_proj.r["default"] == 24


def coverage(config: UpdateConfig, family: str) -> str:
    update, model, _ = prepared(config, family)
    return str(update.describe_coverage(dict(model.named_parameters()), find_layers(model)))


def test_what_is_projected_and_what_is_not_is_said() -> None:
    said = coverage(LowRankUpdateConfig(rank=4), "mixtral")
    assert said == (
        "159 k of the 160 k parameters in the blocks are projected (99.5%); "
        "864 train at full rank: norms, biases, mlp.gate.weight"
    )
    assert coverage(LowRankUpdateConfig(rank=3), "mixtral").endswith("288 train at full rank: norms, biases")


def test_what_gets_no_adapters_is_said_by_name_and_size() -> None:
    said = coverage(LoraUpdateConfig(rank=4), "mixtral")
    assert said.startswith(
        "20.7 k of the 172 k parameters have adapters; 151 k (88.0%) have none: 92.2 k in fused experts"
    )
    for part in ("fused experts (mlp.experts.down_proj)", "the embeddings", "the head", "norms and biases", "mlp.gate"):
        assert part in said, part
    plain = coverage(LoraUpdateConfig(rank=4), "llama")
    assert "experts" not in plain
    update, model, _ = prepared(LoraUpdateConfig(rank=4))
    quantize_linears(find_layers(model).blocks, "nf4")  # which holds two weights a byte, and scales
    assert update.describe_coverage(dict(model.named_parameters()), find_layers(model)) == plain


def test_suppression_of_adapters_ends_with_its_context() -> None:
    update, model, _ = prepared(LoraUpdateConfig(rank=4, alpha=8.0))
    first, second = (model.model.layers[index].mlp.up_proj for index in (0, 1))
    with update.suppressed(model.model.layers[0], 0.25):
        assert (first.scaling["default"], second.scaling["default"]) == (0.5, 2.0)
    assert first.scaling["default"] == 2.0


def test_suppression_without_adapters_scales_what_a_block_adds() -> None:
    class Doubling(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
            return 2 * hidden_states, "weights"

    block, hidden = Doubling(), torch.arange(4.0)
    update = build_update(load([]).update)
    with update.suppressed(block, 0.25):
        output, rest = block(hidden)
    assert torch.equal(output, 1.25 * hidden) and rest == "weights"
    assert torch.equal(block(hidden)[0], 2 * hidden)


def test_lora_fa_keeps_the_thin_product_instead_of_the_input() -> None:
    """Adapters keep what the gradients of their matrices need: x and A x with LoRA, A x alone with LoRA-FA."""
    tokens, inputs, rank = 64, 48, 4

    def kept(name: str) -> int:
        config = UPDATE_CONFIGS[name](rank=rank, target_modules=["o_proj"])
        update, model, _ = prepared(config)
        layer = model.model.layers[0].self_attn.o_proj.to_empty(device="cpu")
        names = update.trainable_parameters([f"o_proj.{key}" for key, _ in layer.named_parameters()])
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(f"o_proj.{key}" in names)
        parameters = {parameter.data_ptr() for parameter in layer.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = layer(torch.randn(1, tokens, inputs))
        assert output.requires_grad
        return sum(saved.values())

    assert kept("lora") == 4 * tokens * (inputs + rank)
    assert kept("lora_fa") == 4 * tokens * rank
