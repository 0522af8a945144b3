"""Loading on real ranks: the same weights as transformers' own loading, within the memory that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.loading import initialize_random, load_pretrained, restore_buffers
from tests.support.families import FAMILIES, tiny_config
from tests.support.private_memory import give_freed_tensors_back_at_once, peak_private_bytes
from tests.support.ranks import run_on_fresh_ranks, run_on_ranks

MIB = 1 << 20


def sharded(config: Any, dtype: torch.dtype, mesh_shape: tuple[int, ...] | None = None) -> nn.Module:
    """Build on meta, shard (each block, then the root) and allocate, filled with NaN."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = ("replicate", "shard")[-len(mesh_shape or (0,)) :]
    mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),), mesh_dim_names=names)
    for block in find_layers(model).blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gives each of two tied modules a tensor of its own
    for parameter in model.parameters():
        parameter.detach().to_local().fill_(float("nan"))
    return model


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def loaded_state(directory: str, dtype: torch.dtype, mesh_shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    config = AutoConfig.from_pretrained(directory)
    model = sharded(config, dtype, mesh_shape)
    restore_buffers(model)
    assert load_pretrained(model, directory) == []
    return {name: full(tensor).detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def compare_with_transformers(root: str) -> None:
    for family in FAMILIES:
        directory = f"{root}/{family}"
        ours = loaded_state(directory, torch.float32)
        if dist.get_rank() > 0:
            continue  # each tensor is the same whole one on all ranks
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = dict([*theirs.named_parameters(), *theirs.named_buffers()])
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor), (family, name)
    # other storage dtypes and a mesh with replicas: one dense family, one with fused experts
    for family in ("llama", "mixtral"):
        theirs = AutoModelForCausalLM.from_pretrained(f"{root}/{family}", dtype=torch.bfloat16)
        ours = loaded_state(f"{root}/{family}", torch.bfloat16, (dist.get_world_size(), 1))
        for name, tensor in theirs.named_parameters():
            assert torch.equal(ours[name], tensor), (family, name)


def test_equals_from_pretrained_for_every_family(tmp_path: Path) -> None:
    """Several files, tied and untied, dense and fused experts, stored in bfloat16."""
    for family in FAMILIES:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / family, max_shard_size="60KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 1
    run_on_ranks(2, compare_with_transformers, str(tmp_path))


# 4 ranks divide neither 130 tokens nor 6 experts
RANDOM_FAMILIES = {
    "llama": {"vocab_size": 130},
    "gemma3": {},
    "gpt2": {"vocab_size": 130},
    "qwen3_moe": {"num_experts": 6},
}


def random_states() -> dict[str, dict[str, Tensor]]:
    states = {}
    for family, changes in RANDOM_FAMILIES.items():
        model = sharded(tiny_config(family, **changes), torch.float32)
        assert initialize_random(model, seed=3) == []
        states[family] = {name: full(parameter).detach() for name, parameter in model.named_parameters()}
    return states


def test_random_weights_do_not_depend_on_the_number_of_ranks() -> None:
    ranks = run_on_ranks(4, random_states)[3]
    for family, changes in RANDOM_FAMILIES.items():
        alone = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
        initialize_random(alone, seed=3)
        assert ranks[family].keys() == dict(alone.named_parameters()).keys()
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, ranks[family][name]), (family, name)


def peak_while_loading(directory: str) -> tuple[int, int, int]:
    """Return the peak private bytes above those before allocation, the shard's bytes and the largest tensor's."""
    give_freed_tensors_back_at_once()
    model = sharded(LlamaConfig.from_pretrained(directory), torch.float32)
    load_pretrained(model, directory)  # once before: imports, thread pools and allocator pools are no part of it
    del model
    made: list[nn.Module] = []

    def load() -> None:
        made.append(sharded(LlamaConfig.from_pretrained(directory), torch.float32))
        load_pretrained(made[0], directory)

    peak = peak_private_bytes(load)
    model = made[0]
    shard = sum(parameter.to_local().nbytes for parameter in model.parameters())
    largest = max(parameter.numel() * 4 for parameter in model.parameters())
    return peak, shard, largest


def test_peak_memory_is_below_the_shard_and_the_largest_tensor(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    total = sum(tensor.nbytes for tensor in weights.values())
    assert total >= 200 * MIB
    config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights
    for peak, shard, largest in run_on_fresh_ranks(2, peak_while_loading, str(tmp_path)):
        assert shard == pytest.approx(total / 2, rel=0.01)
        assert shard * 0.9 < peak < 1.3 * shard + largest, "the lower bound shows that the measurement sees the shard"
