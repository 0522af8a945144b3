"""AdamW with moments in 8 bits; needs torchao but for its absence."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lisa_dist.config import UserError
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS
from lisa_dist.method.module import begin_period, count_persistent_bytes
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, make_config, make_global_batches

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


def config_of(name: str) -> Any:
    config = make_config(sampler={"period": 2, "active_layers": 1})
    config.optimizer = OPTIMIZER_CONFIGS[name](lr=1e-3, weight_decay=0.1, grad_clip=0.5)
    config.model.architecture |= {**SIZES, "vocab_size": 128}
    return config


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    config = config_of("adamw8bit")
    with pytest.raises(UserError, match=r"optimizer=adamw8bit: needs torchao, .*; run pip install torchao"):
        check_combinations(config)
    with pytest.raises(UserError, match="optimizer=adamw8bit: torchao can't be imported"):
        optimizer_spec(config.optimizer)


def train(name: str) -> dict[str, Any]:
    """Six steps in three periods. Runs on every rank."""
    train_module = build_and_load(config_of(name))
    losses, sizes = [], []
    with torch.compiler.set_stance("force_eager"):
        for step, micro_batches in enumerate(make_global_batches(6)):
            if step % 2 == 0:
                begin_period(train_module, step // 2)
                sizes.append(count_persistent_bytes(train_module)["optimizer_state"])
            mine = micro_batches[distributed.rank() :: distributed.world_size()]
            losses.append(train_step(train_module, mine, step, 6).loss)
    saved = train_module.optimizer.moment_tensors()
    before = {key: tensor.to_local().clone() for key, tensor in saved.items()}
    train_module.optimizer.load_moments(saved)
    after = {key: tensor.to_local() for key, tensor in train_module.optimizer.moment_tensors().items()}
    error = max(float((after[key] - before[key]).norm() / (before[key].norm() + 1e-12)) for key in before)
    elements = [parameter.to_local().numel() for parameter in train_module.optimizer.parameters.values()]
    return {"losses": losses, "sizes": sizes, "error": error, "elements": elements}


def test_training_follows_adamw_with_less_state() -> None:
    pytest.importorskip("torchao")
    plain, small = (run_on_ranks(2, train, name)[0] for name in ("adamw", "adamw8bit"))
    assert small["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert len(set(small["sizes"])) == 1  # released at every freeze
    # Two moments: codes, a scale for each 256, a table of 256 numbers; small and odd shards stay in fp32.
    in_8_bits = [n for n in small["elements"] if n >= 4096 and n % 256 == 0]
    in_fp32 = [n for n in small["elements"] if n not in in_8_bits]
    assert in_8_bits and in_fp32
    assert small["sizes"][0] == sum(2 * (n + 4 * n // 256 + 4 * 256) for n in in_8_bits) + sum(8 * n for n in in_fp32)
    assert plain["sizes"][0] == 8 * sum(plain["elements"])
    state_bytes = optimizer_spec(config_of("adamw8bit").optimizer).state_bytes
    assert small["sizes"][0] == sum(state_bytes(torch.empty(n)) for n in small["elements"])
    assert small["error"] < 0.02 and plain["error"] == 0


def test_a_plan_counts_its_bytes() -> None:
    pytest.importorskip("torchao")
    config = config_of("adamw8bit")
    config.sampler.active_layers = 1
    config.parallel.nproc_per_node = "2"
    assert simulate(config).persistent_bytes["optimizer_state"] == run_on_ranks(2, train, "adamw8bit")[0]["sizes"][0]
