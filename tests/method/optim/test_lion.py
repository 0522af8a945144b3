"""Lion against its formula, its bytes against AdamW's, and its state across freezes, on real ranks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from lisa_dist.config import Config
from lisa_dist.config.loading import load, vary
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS
from lisa_dist.config.updates import LowRankUpdateConfig
from lisa_dist.method.module import begin_period, count_persistent_bytes
from lisa_dist.method.optim import optimizer_spec
from lisa_dist.method.optim.schedule import learning_rate
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime import distributed
from lisa_dist.sharding.memory_policy import activation_budget
from lisa_dist.training.step import train_step
from tests.support.plain_methods import PlainGaLore, adam, plain_model, train_by_hand
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches

STEPS, PERIOD, RANK = 4, 3, 3


def config_of(name: str, **settings: Any) -> Config:
    """A configuration of three blocks, one of them active."""
    config = make_config(sampler={"period": PERIOD, "active_layers": 1, "seed": 1})
    config.model.architecture["num_hidden_layers"] = 3
    config.parallel.memory_limit = 8.0
    config.optimizer = OPTIMIZER_CONFIGS[name](lr=1e-3, weight_decay=0.1, grad_clip=0.5, **settings)
    return config


@functools.cache
def trained(name: str, world_size: int) -> dict[str, Any]:
    """A period and a step of full-rank updates on ranks, of which several tests look at the results."""
    return run_on_ranks(world_size, train, config_of(name))[0]


def train(config: Config) -> dict[str, Any]:
    """Train for a period and a step. Runs on every rank."""
    train_module = build_and_load(config)
    seen: dict[str, Any] = {"initial": full_parameters(train_module), "trained": [], "losses": []}
    for step, micro_batches in enumerate(make_global_batches(STEPS)):
        if step % PERIOD == 0:
            begin_period(train_module, step // PERIOD)
        seen["trained"].append(sorted(train_module.optimizer.parameters))
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        seen["losses"].append(train_step(train_module, mine, step, STEPS).loss)
    optimizer = train_module.optimizer
    kinds = {name.rpartition(".")[2] for name in optimizer.moment_tensors()}
    shards = [distributed.local_shard(entry.stepped.detach()) for entry in optimizer.trained.values()]
    state_bytes = optimizer_spec(config.optimizer).state_bytes
    planned, budget = sum(map(state_bytes, shards)), activation_budget(config, train_module.store, 0, state_bytes)
    counted = count_persistent_bytes(train_module)["optimizer_state"]
    return seen | {
        "final": full_parameters(train_module),
        "kinds": kinds,
        "bytes": counted,
        "by_spec": planned,
        "budget": budget,
    }


def assert_equals_plain_lion(config: Config, result: dict[str, Any], direction: Any) -> None:
    """The same steps by hand, from the formula."""
    model = plain_model(config)
    model.load_state_dict(result["initial"])
    rates = [learning_rate(config.scheduler, config.optimizer.lr, step, STEPS) for step in range(STEPS)]
    trained = result["trained"]
    losses = train_by_hand(
        model, lambda step: trained[step], make_global_batches(STEPS), rates, 0.1, 0.5, direction, lion=True
    )
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    for name, parameter in model.named_parameters():
        moved = (parameter - result["initial"][name]).norm()
        assert (moved > 0) == any(name in names for names in trained)
        assert (result["final"][name] - parameter).norm() <= 1e-3 * moved, name


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_are_those_of_the_formula(world_size: int) -> None:
    config, result = config_of("lion"), trained("lion", world_size)
    assert set(result["trained"][0]) != set(result["trained"][-1]), "a seed whose draws differ is needed"
    assert_equals_plain_lion(config, result, adam)
    assert result["kinds"] == {"exp_avg"}


def test_its_one_moment_follows_the_projection_of_a_low_rank_update() -> None:
    config = config_of("lion")
    config.update = LowRankUpdateConfig(rank=RANK, refresh_every=2, scale=0.5)
    result = run_on_ranks(2, train, config)[0]
    galore = PlainGaLore(RANK, refresh_every=2, scale=0.5)
    assert_equals_plain_lion(config, result, galore.in_blocks)
    assert result["kinds"] == {"exp_avg", "projector"}


def test_its_state_is_half_of_adamws_and_what_a_plan_and_its_specification_say() -> None:
    lion, adamw = (trained(name, 2) for name in ("lion", "adamw"))
    assert 2 * lion["bytes"] == adamw["bytes"] > 0
    assert (lion["by_spec"], adamw["by_spec"]) == (lion["bytes"], adamw["bytes"])
    assert lion["budget"] - adamw["budget"] == lion["bytes"], "what it saves is there for activations"
    config = config_of("lion")
    config.parallel.nproc_per_node = "2"
    assert simulate(config).persistent_bytes["optimizer_state"] == lion["bytes"]


def test_its_defaults_are_its_own_and_what_was_set_stays_where_it_is_varied() -> None:
    assert load(["optimizer=lion"]).optimizer.betas == [0.9, 0.99]
    assert load(["optimizer.name=lion", "experiment=null", "model=custom"]).optimizer.lr == 5e-6
    varied = vary(load(["model=custom", "optimizer.weight_decay=0.3"]), ["optimizer=lion"]).optimizer
    assert dataclasses.asdict(varied) == dataclasses.asdict(OPTIMIZER_CONFIGS["lion"](lr=5e-6, weight_decay=0.3))
