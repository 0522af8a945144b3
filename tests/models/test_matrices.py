"""The outlier probe looks at every weight matrix of a block, or names those whose inputs it can't see."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.models.layer_map import find_layers
from lisa_dist.models.matrices import InputSquares
from lisa_dist.models.tiny_copy import tiny_copy
from tests.support.every_architecture import FIELDS


@pytest.mark.parametrize(
    ("model_type", "unseen"),
    [
        ("mixtral", set()),
        ("dbrx", {"DbrxExpertGLU.v1", "DbrxExpertGLU.w1", "DbrxExpertGLU.w2"}),
        ("llama4_text", {"Llama4TextExperts.down_proj", "Llama4TextExperts.gate_up_proj"}),
        ("jetmoe", {"JetMoeParallelExperts.weight"}),
    ],
)
def test_every_matrix_of_a_block_is_seen_or_named(model_type, unseen):
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **FIELDS.get(model_type, {})))
    model = tiny_copy(whole, find_layers(whole).blocks_path)
    layers = find_layers(model)
    seen = InputSquares(layers, torch.device("cpu"))
    tokens = torch.arange(5, 21).view(2, 8)
    seen.kept = torch.ones_like(tokens)
    with torch.no_grad(), seen.watching():
        model(input_ids=tokens, use_cache=False)

    assert seen.unseen == unseen
    found = {name for name, squares in seen.squares.items() if squares.any()}
    blocks = tuple(f"{name}." for name in layers.block_names)
    matrices = {name for name, p in model.named_parameters() if name.startswith(blocks) and p.dim() > 1}
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in matrices}
    left_out = {name for name in matrices if f"{kinds[name]}.{name.rpartition('.')[2]}" in unseen}
    assert matrices - found == left_out
