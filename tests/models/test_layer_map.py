"""The parts of every family are found, and each parameter belongs to one of them."""

from __future__ import annotations

import pytest
from torch import nn

from lisa_dist.config import UserError
from lisa_dist.models.layer_map import LayerMap, find_layers
from tests.support.families import FAMILIES, meta_model

STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}  # all others: model.layers
TIED = {"qwen2", "gemma", "gemma2", "gemma3", "gpt2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_every_family(family: str) -> None:
    model = meta_model(family)
    layers = find_layers(model)
    assert layers.blocks_path == STACKS.get(family, "model.layers")
    assert len(layers.blocks) == model.config.num_hidden_layers
    assert [model.get_submodule(name) for name in layers.block_names] == layers.blocks
    assert layers.head is model.get_output_embeddings() is model.get_submodule(layers.head_name)
    assert layers.tied == (family in TIED)
    assert len(layers.embeddings) == (2 if family == "gpt2" else 1)  # token and position embeddings
    assert len(layers.norm) == (0 if family == "olmo" else 1)  # OLMo's norm has no parameters
    parts = {f"block:{i}": [block] for i, block in enumerate(layers.blocks)}
    parts |= {"embeddings": layers.embeddings, "norm": layers.norm, "head": [layers.head]}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        members = {id(p) for module in parts[layers.group_of(name)] for p in module.parameters()}
        assert id(parameter) in members, name
    assert layers.group_of(f"{layers.head_name}.weight") == ("embeddings" if layers.tied else "head")


def test_a_norm_inside_the_embeddings_is_a_part_of_them() -> None:
    model = meta_model("llama")
    model.model.embed_tokens.embed_norm = nn.LayerNorm(48, device="meta")  # as Inkling's
    layers = find_layers(model)
    assert layers.group_of("model.embed_tokens.embed_norm.weight") == "embeddings"
    assert layers.norm_names == ["model.norm"]  # FSDP2 wants a parameter in one group only


def test_parameters_added_to_a_block_belong_to_it() -> None:
    layers = find_layers(meta_model("llama"))
    assert layers.group_of("model.layers.12.self_attn.q_proj.lora_A.default.weight") == "block:12"
    assert layers.group_of("model.layers.1.self_attn.q_proj.base_layer.weight") == "block:1"


class Unusual(nn.Module):
    """A decoder whose blocks lie in no ModuleList, beside a list of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.stack = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.out = nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_no_stack_is_an_error_that_names_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.blocks=null: no stack of blocks was found in Unusual .*stack"):
        find_layers(Unusual())


def test_stack_named_by_hand() -> None:
    layers: LayerMap = find_layers(Unusual(), "stack")
    assert layers.block_names == ["stack.0", "stack.1"]
    assert layers.embedding_names == ["embed"] and layers.head_name == "out" and layers.norm == []
    with pytest.raises(UserError, match=r"model\.blocks=stak: .*did you mean stack\?"):
        find_layers(Unusual(), "stak")


def test_lists_within_blocks_are_not_the_stack() -> None:
    """Two blocks of six experts each: the experts' lists are longer, and lie within the stack."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    model = Unusual()
    model.stack = nn.ModuleList([Block(), Block()])
    assert find_layers(model).block_names == ["stack.0", "stack.1"]
