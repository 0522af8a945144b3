"""Parameters in host memory: training is the same, and the plan takes them off the device."""

from __future__ import annotations

from typing import Any

import torch

from lisa_dist.method.module import begin_period
from lisa_dist.planning.simulation import simulate
from tests.support.planned import make_config as make_planned_config
from tests.support.ranks import run_on_ranks
from tests.support.small_training import PERIOD, build_and_load, make_config, train_on_rank


def places_after_switches() -> list[bool]:
    """Whether exactly the frozen parameters are marked as lying in host memory. Runs on every rank."""
    train_module = build_and_load(make_config(parallel={"offload": "frozen"}))
    right = []
    for period in range(3):
        begin_period(train_module, period)
        marks = {name: fsdp_param.offload_to_cpu for name, (fsdp_param, _) in train_module.store.handles.items()}
        right.append(all(marks[name] == (name not in train_module.optimizer.parameters) for name in marks))
    return right


def train_with(offload: str) -> dict[str, Any]:
    """Into a second period with parameters in host memory. Runs on every rank."""
    config = make_config(parallel={"offload": offload})
    config.model.architecture["num_hidden_layers"] = 3
    result = train_on_rank(config, PERIOD + 1)
    return {"losses": result["losses"], "final": result["final"]}


def test_training_is_the_same_wherever_parameters_lie() -> None:
    plain = run_on_ranks(2, train_with, "none")[0]
    for offload in ("frozen", "all"):
        other = run_on_ranks(2, train_with, offload)[0]
        assert other["losses"] == plain["losses"], offload
        assert all(torch.equal(parameter, plain["final"][name]) for name, parameter in other["final"].items()), offload


def test_frozen_parameters_go_to_the_host_and_return_at_every_switch() -> None:
    assert run_on_ranks(2, places_after_switches) == [[True] * 3] * 2


def test_a_plan_takes_from_the_peak_what_lies_on_the_host() -> None:
    config = make_planned_config("llama", "lisa")
    plain = simulate(config)
    sizes = plain.persistent_bytes
    for offload, expected in (("frozen", sizes["frozen_parameters"]), ("all", sum(sizes.values()))):
        config.parallel.offload = offload
        offloaded = simulate(config)
        assert offloaded.persistent_bytes == sizes and plain.host_bytes == 0
        assert offloaded.host_bytes == expected
        # Padding of uneven shards is on the host too; gradients go there only once they are reduced.
        saved = plain.peaks["backward of block 2 of 3"] - offloaded.peaks["backward of block 2 of 3"]
        assert expected - sizes["gradients"] - 4096 <= saved <= expected + 4096, offload
