"""What a sampler is told of the training steps, on real ranks, against plain gradients."""

from __future__ import annotations

from typing import Any

import pytest

from lisa_dist.config import Config
from lisa_dist.config.sampling import BanditSamplerConfig
from lisa_dist.config.updates import LowRankUpdateConfig
from lisa_dist.method.module import begin_period
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.plain_methods import mean_loss, plain_model
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches

RANKS = 4
STEPS = [step[:RANKS] for step in make_global_batches(3)]  # one sequence a rank


def make_bandit(**changes: Any) -> Config:
    """A configuration whose sampler learns from the steps, of periods of two steps."""
    config = make_config(**changes)
    config.sampler = BanditSamplerConfig(active_layers=2, period=2)
    return config


def observe_on_rank(config: Config) -> dict[str, Any]:
    """Train a period and a step; what the sampler of this rank was told, and its state. Runs on every rank."""
    train_module = build_and_load(config)
    initial = full_parameters(train_module)
    seen: list[dict[int, float]] = []
    sampler = train_module.sampler.sampler
    take = sampler.observe_step

    def note(squares: Any) -> None:
        seen.append(dict(squares))
        take(squares)

    sampler.observe_step = note  # type: ignore[method-assign]
    for step, micro_batches in enumerate(STEPS):
        if step % 2 == 0:
            begin_period(train_module, step // 2)
        train_step(train_module, micro_batches[distributed.rank() :: distributed.world_size()], step, len(STEPS))
    return {"initial": initial, "seen": seen, "scores": sampler.scores()}


def test_the_first_step_shows_the_mean_squares_of_plain_gradients() -> None:
    config = make_bandit()
    result = run_on_ranks(1, observe_on_rank, config)[0]
    model = plain_model(config)
    model.load_state_dict(result["initial"])
    mean_loss(model, STEPS[0]).backward()
    layers: Any = model.get_submodule("model.layers")
    expected = {}
    for block in result["seen"][0]:
        gradients = [parameter.grad for parameter in layers[block].parameters()]
        total = sum(float(gradient.double().square().sum()) for gradient in gradients)
        expected[block] = total / sum(gradient.numel() for gradient in gradients)
    assert len(expected) == 2 and result["seen"][0] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one rank sees."""
    return run_on_ranks(1, observe_on_rank, make_bandit(optimizer={"grad_clip": 0.0}))[0]


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(RANKS, {"parallel": {"replicate": 2}}, id="hybrid", marks=pytest.mark.soak),
        pytest.param(RANKS, {"parallel": {"replicate": 2, "optimizer_shard": "world"}}, id="masters apart"),
        pytest.param(RANKS, {"parallel": {"replicate": 2}, "optimizer": {"in_backward": True}}, id="in backward"),
        pytest.param(2, {"parallel": {"offload": "all"}}, id="offloaded"),
    ],
)
def test_any_mesh_shows_the_sampler_of_rank_0_the_same(
    ranks: int, changes: dict[str, Any], alone: dict[str, Any]
) -> None:
    unclipped = {"optimizer": {"grad_clip": 0.0} | changes.get("optimizer", {})}
    main, *others = run_on_ranks(ranks, observe_on_rank, make_bandit(**changes | unclipped))
    assert [sorted(step) for step in main["seen"]] == [sorted(step) for step in alone["seen"]]
    for step, expected in zip(main["seen"], alone["seen"], strict=True):
        assert step == pytest.approx(expected, rel=1e-3)
    assert all(not other["seen"] for other in others)


def test_gradients_are_seen_before_they_are_projected() -> None:
    config = make_bandit()
    plain = run_on_ranks(1, observe_on_rank, config)[0]
    config.update = LowRankUpdateConfig(rank=2)
    assert run_on_ranks(1, observe_on_rank, config)[0]["seen"][0] == pytest.approx(plain["seen"][0], rel=1e-5)
