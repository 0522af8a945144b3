"""What weight decay leaves out, against transformers' Trainer, and in every path of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from lisa_dist.config import OptimizerConfig
from lisa_dist.config.method import UPDATE_CONFIGS
from lisa_dist.method.optim.active_optimizer import ActiveOptimizer
from lisa_dist.method.optim.weight_decay import norms_and_biases
from lisa_dist.method.updates import build_update
from tests.support.families import FAMILIES, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_left_out_as_by_the_trainer_of_transformers(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = {name for name, _ in model.named_parameters()}
    left_out = norms_and_biases(model)
    assert left_out == names - decayed
    assert decayed and (left_out or family == "olmo"), "olmo's norms have no parameters"


class Block(nn.Module):
    """A linear layer with a bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.input_layernorm = nn.RMSNorm(8)


def decayed_by_a_step(**settings: Any) -> dict[str, float]:
    """By which factor a step along a gradient of zero shrinks each parameter of a block."""
    model = Block()
    config = OptimizerConfig(**settings)
    undecayed = frozenset() if config.decay_norms_and_biases else norms_and_biases(model)
    optimizer = ActiveOptimizer(config, build_update(UPDATE_CONFIGS["full_rank"]()), undecayed)
    parameters = dict(model.named_parameters())
    optimizer.add_params(parameters)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step(0.1)
    return {name: float((parameter.detach() / before[name]).mean()) for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_norms_and_biases_are_decayed_only_where_asked(name: str) -> None:
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    shrunk = decayed_by_a_step(name=name, weight_decay=0.5)
    assert shrunk == pytest.approx({"linear.weight": 0.95, "linear.bias": 1.0, "input_layernorm.weight": 1.0})
    everything = decayed_by_a_step(name=name, weight_decay=0.5, decay_norms_and_biases=True)
    assert everything == pytest.approx(dict.fromkeys(shrunk, 0.95))
