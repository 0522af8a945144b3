"""Every update on real ranks against its formulas in plain PyTorch, and against peft."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from lisa_dist.config import Config
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.config.updates import UPDATE_CONFIGS, AlwaysActiveConfig
from lisa_dist.method.module import begin_period, build_train_module
from lisa_dist.models.quantization import dequantize
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.compared import STEPS, compare, train_on_rank
from tests.support.families import tiny_config
from tests.support.plain_methods import PlainGaLore, adam, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.small_training import (
    build_and_load,
    changed_by_step,
    full_parameters,
    make_config,
    make_global_batches,
    to_be_trained,
)

BLOCKS, RANK = 3, 5
PROJECTORS = ["svd", "randomized"]
NONE_ALWAYS = AlwaysActiveConfig(embeddings=False, norm=False, head=False)


def make_method(sampler: str, update: str, always: bool, **settings: Any) -> Config:
    """A configuration of three blocks; ``settings`` are those of the update."""
    config = make_config()
    config.model.architecture["num_hidden_layers"] = BLOCKS
    config.sampler = dataclasses.replace(SAMPLER_CONFIGS[sampler](), period=2, active_layers=1)
    config.update = dataclasses.replace(UPDATE_CONFIGS[update](), **settings)
    config.optimizer.lr = 1e-2
    if not always:
        config.always_active = NONE_ALWAYS
    return config


# One rank keeps its weights in another store than two.
@pytest.mark.parametrize(
    ("changed", "world_size"),
    [
        pytest.param(False, 1, id="plain-1"),
        pytest.param(False, 2, id="plain-2", marks=pytest.mark.soak),
        pytest.param(True, 1, id="rslora and dora-1", marks=pytest.mark.soak),
        pytest.param(True, 2, id="rslora and dora-2"),
    ],
)
def test_lora_equals_peft(changed: bool, world_size: int) -> None:
    config = make_method("all", "lora", always=False, rank=RANK, alpha=7.0, rslora=changed, dora=changed)
    result = run_on_ranks(world_size, train_on_rank, config)[0]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = LoraConfig(r=RANK, lora_alpha=7.0, target_modules=targets, use_rslora=changed, use_dora=changed)
    model = inject_adapter_in_model(theirs, plain_model(config))
    assert result["trained"][0] == sorted(name for name, _ in model.named_parameters() if ".lora_" in name)
    for name, tensor in result["initial"].items():
        if ".lora_A." in name:
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1, name  # uniform up to 1 / sqrt(inputs)
        elif ".lora_B." in name:
            assert not tensor.any()
    compare(result, model, config, adam)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.soak), "nf4"])
def test_lora_on_quantised_weights_equals_peft_on_what_they_stand_for(kind: str) -> None:
    config = make_method("all", "lora", always=False, rank=RANK, alpha=7.0, target_modules=["q_proj", "down_proj"])
    config.model.architecture["intermediate_size"] = 96  # nf4 packs pairs of inputs
    exact = run_on_ranks(2, initial_weights, config)[0]
    config.model.quantization = kind
    result = run_on_ranks(2, train_on_rank, config)[0]
    codes_dtype, largest_error = {"int8": (torch.int8, 0.01), "nf4": (torch.uint8, 0.12)}[kind]
    weights = {name: value for name, value in result["initial"].items() if not name.endswith("_scale")}
    for name, value in weights.items():
        scale = result["initial"].get(f"{name}_scale")
        if scale is None:
            assert torch.equal(value, exact[name])
        else:
            weights[name] = dequantize(value.to(codes_dtype), scale, kind, torch.float32)
            assert 0 < (weights[name] - exact[name]).norm() / exact[name].norm() < largest_error, name
    assert sum(f"{name}_scale" in result["initial"] for name in weights) == 7 * BLOCKS
    final = {name: result["final"][name] if ".lora_" in name else value for name, value in weights.items()}
    theirs = LoraConfig(r=RANK, lora_alpha=7.0, target_modules=["q_proj", "down_proj"])
    model = inject_adapter_in_model(theirs, plain_model(config))
    compare({**result, "initial": weights, "final": final}, model, config, adam)


def test_adapters_start_alike_at_any_number_of_ranks_and_from_different_values() -> None:
    config = make_method("all", "lora", always=False, rank=RANK)
    alone, here = (run_on_ranks(size, initial_weights, config)[0] for size in (1, 2))
    assert all(torch.equal(alone[name], here[name]) for name in alone if ".lora_" in name)
    first = [tensor for name, tensor in alone.items() if "q_proj.lora_A" in name]
    assert len(first) == BLOCKS and not torch.equal(first[0], first[1])


def initial_weights(config: Config) -> dict[str, torch.Tensor]:
    """All parameters before training, whole. Runs on every rank."""
    train_module = build_and_load(config)
    return full_parameters(train_module)


@pytest.mark.parametrize("world_size", [1, 2])
def test_lora_fa_equals_its_formula(world_size: int) -> None:
    config = make_method("all", "lora_fa", always=False, rank=RANK, alpha=7.0, target_modules=["q_proj", "down_proj"])
    result = run_on_ranks(world_size, train_on_rank, config)[0]
    theirs = LoraConfig(r=RANK, lora_alpha=7.0, target_modules=["q_proj", "down_proj"])
    model = inject_adapter_in_model(theirs, plain_model(config))
    assert result["trained"][0] == sorted(name for name, _ in model.named_parameters() if ".lora_B." in name)
    assert all(
        torch.equal(result["final"][name], value) for name, value in result["initial"].items() if "lora_A" in name
    )

    def corrected(optimizer: Any, name: str, gradient: torch.Tensor) -> torch.Tensor:
        a = result["initial"][name.replace("lora_B", "lora_A")]
        return adam(optimizer, name, (RANK / 7.0) ** 2 * gradient @ torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(RANK)))

    compare(result, model, config, corrected)


def test_galore_equals_its_formula() -> None:
    config = make_method("all", "low_rank", always=True, rank=RANK, refresh_every=4, scale=0.5)
    results = run_on_ranks(2, train_on_rank, config)
    result = results[0]
    galore = PlainGaLore(RANK, 4, 0.5)
    compare(result, plain_model(config), config, galore.in_blocks, tolerance=2e-3)
    # Projectors and moments are thin and sharded over the ranks.
    shapes = result["state_shapes"]
    assert shapes["model.layers.0.mlp.up_proj.weight.exp_avg"] == (101, RANK)  # of [101, 54]
    assert shapes["model.layers.0.mlp.up_proj.weight.projector"] == (54, RANK)
    assert shapes["model.layers.0.mlp.down_proj.weight.exp_avg"] == (RANK, 101)  # of [54, 101]
    assert shapes["model.layers.0.mlp.down_proj.weight.projector"] == (54, RANK)
    assert all(entry["all_sharded"] for entry in results)
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(entry["state_bytes"] for entry in results) == 4 * elements


@pytest.mark.parametrize(
    ("family", "fields", "world_size"),
    [
        ("gpt2", {}, 2),  # a tied head, and weights that are [inputs, outputs]
        ("mixtral", {"num_local_experts": 2}, 3),  # of whose ranks one holds no expert
        pytest.param(
            "gpt_oss", {"num_local_experts": 5}, 2, marks=pytest.mark.soak
        ),  # experts that are [inputs, outputs] and have biases
    ],
)
def test_galore_projects_every_matrix_of_other_families(family: str, fields: dict[str, Any], world_size: int) -> None:
    config = make_method("all", "low_rank", always=True, rank=RANK, refresh_every=2)
    config.model.architecture = tiny_config(family, initializer_range=0.1, **fields).to_dict()
    # Few tokens leave gradients of experts of too low a rank to have a certain projection.
    size = -(-8 // world_size) * world_size
    result = run_on_ranks(world_size, train_on_rank, config, size)[0]
    galore = PlainGaLore(RANK, 2, 0.25)
    projected = {name.removesuffix(".projector") for name in result["state_shapes"] if name.endswith(".projector")}
    blocks = {name: tensor for name, tensor in result["initial"].items() if ".layers." in name or ".h." in name}
    sizes = {name: tensor.numel() for name, tensor in blocks.items()}
    assert sum(sizes[name] for name in projected) > 0.95 * sum(sizes.values())
    assert not any(name.endswith("bias") for name in projected)

    def direction(optimizer: Any, name: str, gradient: torch.Tensor) -> torch.Tensor:
        return galore.direction(optimizer, name, gradient) if name in projected else adam(optimizer, name, gradient)

    compare(result, plain_model(config), config, direction, tolerance=2e-3, size=size)


@pytest.mark.parametrize(
    ("projector", "ranks"), [("randomized", 2), *(pytest.param(kind, 4, marks=pytest.mark.soak) for kind in PROJECTORS)]
)
def test_the_number_of_ranks_does_not_matter_over_three_refreshes(projector: str, ranks: int) -> None:
    config = make_method("all", "low_rank", always=True, rank=RANK, refresh_every=2, projector=projector)
    config.optimizer.lr = 1e-3
    alone, several = (run_on_ranks(count, train_on_rank, config)[0] for count in (1, ranks))
    assert several["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, tensor in alone["final"].items():
        assert (several["final"][name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def projected_parameters(checkpointing: str) -> set[str]:
    """The names of what is projected. Runs on every rank."""
    config = make_method("all", "low_rank", always=True, rank=RANK)
    config.parallel.activation_checkpointing = checkpointing
    return set(build_train_module(config).update.ranks)


def test_what_is_projected_does_not_depend_on_activation_checkpointing() -> None:
    without, automatic = (run_on_ranks(1, projected_parameters, kind)[0] for kind in ("none", "auto"))
    assert automatic == without and len(without) == 7 * BLOCKS


def thawed_adapters(update: str) -> dict[str, Any]:
    """The trained adapters of a block before it is frozen and after it is thawed again. Runs on every rank."""
    config = make_method("sweep", update, always=False, rank=RANK)
    config.precision = dataclasses.replace(config.precision, frozen="bfloat16")
    train_module = build_and_load(config)
    kept, dtypes = [], []

    def values() -> dict[str, torch.Tensor]:
        whole = full_parameters(train_module)
        return {name: whole[name] for name in names}

    for period, blocks in enumerate([[0], [1], [0]]):
        with mock.patch.object(train_module.sampler, "draw", return_value=blocks):
            begin_period(train_module, period)
        names = train_module.update.trainable_parameters(train_module.store.block_parameters(0))
        kept.append(values())
        dtypes.append({train_module.store.parameter(name).dtype for name in names})
        if period == 0:
            train_step(
                train_module, make_global_batches(1)[0][distributed.rank() :: distributed.world_size()], 1, STEPS
            )
            kept.append(values())
    base = {train_module.store.parameter(name).dtype for name in train_module.store.names if "base_layer" in name}
    return {"kept": kept, "dtypes": dtypes, "base": base}


@pytest.mark.parametrize("update", [pytest.param("lora", marks=pytest.mark.soak), "lora_fa"])
def test_adapters_that_are_frozen_for_a_period_lose_nothing(update: str) -> None:
    result = run_on_ranks(2, thawed_adapters, update)[0]
    start, trained, frozen, thawed = result["kept"]
    assert any(not torch.equal(tensor, start[name]) for name, tensor in trained.items())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in trained.values())
    for name, tensor in trained.items():
        assert torch.equal(frozen[name], tensor) and torch.equal(thawed[name], tensor)
    assert result["dtypes"] == [{torch.float32}] * 3 and result["base"] == {torch.bfloat16}


def test_low_rank_updates_of_sampled_blocks_forget_frozen_ones() -> None:
    config = make_method("uniform", "low_rank", always=True, rank=RANK, refresh_every=100, scale=1.0)
    config.sampler.seed = 3
    result = run_on_ranks(2, train_on_rank, config)[0]
    assert len({tuple(draw) for draw in result["draws"]}) > 1, "a seed whose draws differ is needed for this test"
    galore = PlainGaLore(RANK, 100, 1.0)
    compare(result, plain_model(config), config, galore.in_blocks, tolerance=2e-3)


def test_badam_trains_each_block_once_a_sweep() -> None:
    config = make_method("sweep", "full_rank", always=False)
    result = run_on_ranks(2, train_on_rank, config)[0]
    assert result["draws"] == [[2], [1], [0]]
    compare(result, plain_model(config), config, adam)


SAMPLER_SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"blocks": [1]},
    "importance": {"suppressed_sets": 2},
    "outlier": {"threshold": 2.0},
    "weighted": {"law": "weight_norm"},
}


def train_every_sampler(update: str) -> dict[str, list[tuple[set[str], set[str]]]]:
    """Two periods of one step with each sampler: what was to change in each, and what did. Runs on every rank."""
    found: dict[str, list[tuple[set[str], set[str]]]] = {}
    for sampler, schema in SAMPLER_CONFIGS.items():
        config = make_method(sampler, update, always=False)
        settings = {"active_layers": 1, "period": 1, **SAMPLER_SETTINGS.get(sampler, {})}
        config.sampler = schema(**settings)
        train_module = build_and_load(config)
        batches = [step[distributed.rank() :: distributed.world_size()][:2] for step in make_global_batches(2)]
        found[sampler] = []
        for step, micro_batches in enumerate(batches):
            begin_period(train_module, step, lambda count, micro_batches=micro_batches: (micro_batches * count)[:count])
            found[sampler].append((to_be_trained(train_module), changed_by_step(train_module, micro_batches, step, 2)))
    return found


@pytest.mark.parametrize(
    "update",  # one stands for all in the ordinary tests: test_pairs compares the others' numbers with each sampler's
    [pytest.param(update, marks=[pytest.mark.soak] * (update != "full_rank")) for update in sorted(UPDATE_CONFIGS)],
)
def test_every_sampler_goes_with_every_update(update: str) -> None:
    """What the sampler has drawn and the update trains changes, all of it, and nothing else does."""
    first, second = run_on_ranks(2, train_every_sampler, update)
    assert first.keys() == SAMPLER_CONFIGS.keys()
    for sampler in first:
        for (wanted, here), (also_wanted, there) in zip(first[sampler], second[sampler], strict=True):
            assert wanted == also_wanted and here | there == wanted, sampler
