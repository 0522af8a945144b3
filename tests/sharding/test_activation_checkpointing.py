"""Kinds of activation checkpointing: what each keeps, what it costs, the choice among them, and equal results."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist.config import Config, UserError
from lisa_dist.config.updates import LoraUpdateConfig
from lisa_dist.method.updates import build_update
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.sharding.activation_checkpointing import KINDS, OPERATIONS_PER_BYTE, Cost, choose, set_checkpointing
from lisa_dist.sharding.memory_policy import measure_costs
from tests.support.families import tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.small_training import PERIOD, make_config, train_on_rank

TOKENS, HIDDEN, MIDDLE = 64, 96, 160
COSTS = {
    True: {"none": Cost(29, 0.0), "selective": Cost(12, 3.0), "full": Cost(1, 20.0)},
    False: {"none": Cost(21, 0.0), "selective": Cost(12, 2.5), "full": Cost(1, 20.0)},
}


@pytest.fixture(scope="module")
def costs() -> dict[bool, dict[str, Cost]]:
    config = Config()
    config.data.sequence_length = TOKENS
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": MIDDLE, "num_hidden_layers": 3}
    architecture = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    return {
        trains: measure_costs(config, model, lambda: build_update(config.update), trains) for trains in (True, False)
    }


def test_each_kind_keeps_what_arithmetic_says(costs: dict[bool, dict[str, Cost]]) -> None:
    unit = TOKENS * HIDDEN * 2  # a bf16 tensor of tokens x hidden
    assert costs[True]["full"].bytes == costs[False]["full"].bytes == unit  # the block's output, the next one's input
    # The outputs of q, k, v, attention and o, of gate and up, the block's own, and attention's log-sum-exp in fp32.
    middle = TOKENS * MIDDLE * 2
    assert costs[True]["selective"].bytes == costs[False]["selective"].bytes == 6 * unit + 2 * middle + TOKENS * 4 * 4
    # An active block keeps the inputs of its linear layers for their gradients, and normalised inputs for the norms'.
    assert costs[True]["none"].bytes - costs[False]["none"].bytes == 4 * unit + middle
    assert costs[False]["none"].bytes > costs[False]["selective"].bytes


def test_full_computes_the_products_again_and_selective_only_the_rest(costs: dict[bool, dict[str, Cost]]) -> None:
    products = 2 * TOKENS * (4 * HIDDEN**2 + 2 * HIDDEN * MIDDLE)  # all but the last, whose result nobody needs
    attention = 2 * 2 * TOKENS * TOKENS * HIDDEN // 2
    for kinds in costs.values():
        assert kinds["none"].recompute == 0 < kinds["selective"].recompute
        rest = kinds["selective"].recompute
        assert kinds["full"].recompute - rest == pytest.approx(products + attention, abs=OPERATIONS_PER_BYTE * 10)


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_block_with_adapters_is_measured(family: str, compute: str) -> None:
    config = make_config(precision={"compute": compute})
    config.update = LoraUpdateConfig(rank=2)
    model = build_meta_model(config.model, tiny_config(family))
    active, frozen = (measure_costs(config, model, lambda: build_update(config.update), it) for it in (True, False))
    assert active["none"].bytes > frozen["none"].bytes and active["full"] == frozen["full"]


@pytest.mark.parametrize("budget", [0, 4, 30, 47, 60, 75, 90, 1000])
def test_the_choice_is_the_best_of_all_assignments(budget: int) -> None:
    counts = {True: 1, False: 3}
    chosen = choose(COSTS, counts, budget)
    classes = [True, False, False, False]
    best = min(
        (
            (sum(COSTS[trains][kind].recompute for trains, kind in zip(classes, kinds)), kinds)
            for kinds in itertools.product(KINDS, repeat=4)
            if sum(COSTS[trains][kind].bytes for trains, kind in zip(classes, kinds)) <= budget
        ),
        default=(4 * 20.0, ()),
    )
    assert sum(COSTS[trains][kind].recompute for trains in counts for kind in chosen[trains]) == best[0]
    assert {trains: len(kinds) for trains, kinds in chosen.items()} == counts


def test_a_block_of_another_making_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.activation_checkpointing=full: Linear can't be checkpointed"):
        set_checkpointing(torch.nn.Linear(2, 2), "full")


def train_with(kind: str, limit: float | None) -> dict[str, Any]:
    """Into a second period with a kind of checkpointing. Runs on every rank."""
    config = make_config(parallel={"activation_checkpointing": kind, "memory_limit": limit})
    config.data.sequence_length = 17
    result = train_on_rank(config, PERIOD + 1, 2)
    return {"losses": result["losses"], "final": result["final"]}


def test_training_is_the_same_with_every_kind() -> None:
    plain = run_on_ranks(2, train_with, "none", None)[0]
    for kind, limit in (("full", None), ("selective", None), ("auto", 2.002)):
        other = run_on_ranks(2, train_with, kind, limit)[0]
        assert other["losses"] == pytest.approx(plain["losses"], rel=1e-6), kind
        for name, parameter in other["final"].items():
            assert torch.allclose(parameter, plain["final"][name], rtol=1e-5, atol=1e-7), (kind, name)
