"""What is proposed where a plan does not fit, and the search for the largest micro-batch: over made-up plans."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest

from lisa_dist.commands.plan import notes_on
from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_global_batch
from lisa_dist.config.gpu import Gpu, read_gpu
from lisa_dist.config.loading import load
from lisa_dist.planning import changes
from lisa_dist.planning.changes import MOST_MICRO_BATCH, Plan, changes_that_fit, search
from lisa_dist.planning.estimate import Estimate
from lisa_dist.planning.simulation import Trace, cluster_dims
from lisa_dist.sharding.ledger import Work
from lisa_dist.sharding.memory_policy import RESERVED_BYTES

GPU = read_gpu("rtx4090")
ROOM = GPU.memory_bytes - RESERVED_BYTES
KEYS = ["model.path=a/model", "data.path=rows.json", "parallel.nproc_per_node=2"]
KINDS = {"none": 1.0, "selective": 0.5, "full": 0.25}  # of the bytes that a sequence takes


def with_keys(config: Config, overrides: list[str]) -> Config:
    """As ``vary``, for single keys of numbers and words, and at once: the search makes dozens of plans."""
    config = copy.deepcopy(config)
    for key, _, value in (override.partition("=") for override in overrides):
        group, _, name = key.partition(".")
        if not name:  # another choice of a whole group, which these plans don't look at
            continue
        setattr(getattr(config, group), name, int(value) if value.isdigit() else value)
    return config


class Planner:
    """Plans of a step whose peak is the greatest of several lines over the micro-batch; counts how many it made.

    Args:
        lines: (fixed bytes, bytes a sequence). The fixed ones are divided by the ranks, and what a sequence takes is
            less with checkpointing, which lets a token take longer.
    """

    def __init__(self, lines: list[tuple[int, int]]) -> None:
        self.lines = lines
        self.made: list[list[str]] = []

    def __call__(self, config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        config = with_keys(config, overrides or [])
        self.made.append(overrides or [])
        kind, size = config.parallel.activation_checkpointing, config.train.micro_batch_size
        tokens, ranks = size * config.data.sequence_length, cluster_dims(config.parallel).num_ranks
        seconds = (2 - KINDS[kind] + (0.5 if config.parallel.offload != "none" else 0)) * tokens * 1e-4 + 1e-2
        trace = Trace(2, 1, {}, 0, {"head": self.peak(kind, size, ranks)}, Work(), tokens * ranks)
        return Plan(overrides or [], config, gpu, trace, Estimate(seconds, 0, 0, seconds, tokens * ranks / seconds))

    def peak(self, kind: str, size: int, ranks: int = 2) -> int:
        return max(fixed * 2 // ranks + int(each * KINDS[kind]) * size for fixed, each in self.lines)

    def largest(self, kind: str) -> int:
        return max((size for size in range(1, MOST_MICRO_BATCH + 1) if self.peak(kind, size) <= ROOM), default=1)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([(0, ROOM // 37)], id="one line"),
        pytest.param([(ROOM // 2, 10**6), (0, ROOM // 50)], id="flat, then steep"),
        pytest.param([(ROOM // 2, 10**3), (ROOM // 3, ROOM // 300), (0, ROOM // 90 + 1)], id="three lines"),
        pytest.param([(ROOM - 10, 10)], id="one sequence to the byte"),
        pytest.param([(ROOM - 20, 10)], id="two sequences to the byte"),
        pytest.param([(ROOM, 4)], id="not one"),
        pytest.param([(0, 4)], id="more than is tried"),
    ],
)
def test_the_search_finds_the_largest_micro_batch_that_fits(
    lines: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(lines)
    monkeypatch.setattr(changes, "make_plan", planner)
    found = search(load(KEYS), GPU)
    assert {plan.config.parallel.activation_checkpointing: plan.config.train.micro_batch_size for plan in found} == {
        kind: planner.largest(kind) for kind in KINDS
    }
    assert [plan.fits for plan in found] == [planner.peak("none", 1) <= ROOM] * 3
    seconds = [plan.estimate.step_seconds / plan.trace.tokens for plan in found]
    assert seconds == sorted(seconds), "the fastest first"
    assert len(planner.made) <= 3 * 10, "each takes seconds"


def test_of_changes_that_fit_the_cheapest_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner([(ROOM // 2, ROOM // 6)])
    monkeypatch.setattr(changes, "make_plan", planner)
    plan = planner(load([*KEYS, "train.micro_batch_size=4"]), GPU)
    assert not plan.fits
    found = changes_that_fit(plan)
    fitting = [other for other in found if other.fits]
    assert fitting == found[: len(fitting)] and len(fitting) < len(found)
    assert [other.overrides for other in fitting] == [
        ["train.micro_batch_size=2"],  # what each step takes besides is for fewer tokens
        ["parallel.activation_checkpointing=selective"],
        ["parallel.activation_checkpointing=full"],
    ]


def test_where_no_change_alone_is_enough_they_are_made_together_with_ever_more_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = Planner([(7 * ROOM, ROOM)])
    monkeypatch.setattr(changes, "make_plan", planner)
    savings = ["parallel.activation_checkpointing=full", "train.micro_batch_size=1"]
    found = changes_that_fit(planner(load([*KEYS, "train.micro_batch_size=4"]), GPU))
    assert found[0].overrides == [*savings, "parallel.nodes=16", "train.global_batch_size=32"]
    assert [plan.fits for plan in found].count(True) == 1
    tried = [plan.overrides for plan in found]
    eight = [*savings, "parallel.nodes=8", "train.global_batch_size=16"]
    for joint in (
        savings,
        [*savings, "parallel.offload=all"],
        ["parallel.nodes=2", "train.global_batch_size=16"],
        eight,
    ):
        assert joint in tried
    fixed = changes_that_fit(planner(load([*KEYS, "parallel.shard=2"]), GPU))
    assert fixed and not any("parallel.nodes" in change for plan in fixed for change in plan.overrides)


@pytest.mark.parametrize(
    "keys", [["train.micro_batch_size=9", "train.global_batch_size=36"], ["optimizer.in_backward=true"]]
)
def test_training_takes_what_is_proposed_as_it_is_pasted(keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "make_plan", Planner([(3 * ROOM, ROOM // 7)]))
    monkeypatch.setattr(changes, "vary", with_keys)
    monkeypatch.setattr(changes, "check_plan_streams", mock.Mock())
    config = load([*KEYS, *keys, "parallel.nproc_per_node=1"])
    for plan in (*changes_that_fit(changes.make_plan(config, GPU)), *search(config, GPU)):
        pasted = with_keys(config, plan.overrides)
        check_global_batch(pasted.train, pasted.parallel.nodes)
        check_accumulation(pasted, pasted.parallel.nodes)


def test_what_a_model_does_not_go_with_is_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner([(0, ROOM // 37)])

    def refuse(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        plan = planner(config, gpu, overrides)
        if plan.config.parallel.activation_checkpointing != "none" or plan.config.train.micro_batch_size > 40:
            raise UserError("parallel.activation_checkpointing=full: this model can't be checkpointed")
        return plan

    monkeypatch.setattr(changes, "make_plan", refuse)
    monkeypatch.setattr(changes, "vary", with_keys)
    (plan,) = search(load(KEYS), GPU)
    assert plan.fits and plan.config.train.micro_batch_size == planner.largest("none") == 37
    for told in (None, UserError("parallel.offload=frozen: other gradients")):
        monkeypatch.setattr(changes, "check_plan_streams", mock.Mock(side_effect=told))
        config = load([*KEYS, "parallel.nproc_per_node=1", "train.micro_batch_size=40"])
        proposed = [change for plan in changes_that_fit(refuse(config, GPU)) for change in plan.overrides]
        assert proposed and not any("checkpointing" in change for change in proposed)
        assert ("parallel.offload=frozen" in proposed) == (told is None)


@pytest.mark.parametrize(("on_host", "too_large"), [(0, True), (2, False)])
def test_what_saves_activations_alone_is_left_out_where_the_rest_is_too_large(
    on_host: int, too_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner([(7 * ROOM, ROOM)])

    def holding(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        plan = planner(config, gpu, overrides)
        return replace(plan, trace=replace(plan.trace, persistent_bytes={"all": ROOM + 1}, host_bytes=on_host))

    monkeypatch.setattr(changes, "make_plan", holding)
    plan = holding(load([*KEYS, "train.micro_batch_size=4"]), GPU)
    tried = [other.overrides for other in changes_that_fit(plan)]
    savings = ["parallel.activation_checkpointing=full", "train.micro_batch_size=1"]
    for of_activations in (["train.micro_batch_size=2"], savings[:1], savings):
        assert (of_activations in tried) != too_large
    assert ["parallel.offload=all"] in tried and [*savings, "parallel.offload=all"] in tried
    assert any("too much by itself" in note for note in notes_on(plan)) == too_large


def test_less_is_trained_at_a_time_before_there_are_more_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner([(7 * ROOM, ROOM)])
    ends = [f"always_active.{part}=false" for part in ("embeddings", "norm", "head")]

    def smaller(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        plan = planner(config, gpu, overrides)
        fits = {*ends, "sampler.active_layers=1"}.issubset(plan.overrides)
        return replace(plan, trace=replace(plan.trace, peaks={"head": 1})) if fits else plan

    monkeypatch.setattr(changes, "make_plan", smaller)
    found = changes_that_fit(planner(load(KEYS), GPU))
    savings = ["parallel.activation_checkpointing=full", "parallel.offload=all"]
    assert found[0].fits and found[0].overrides == [*savings, *ends, "sampler.active_layers=1"]
    tried = [plan.overrides for plan in found]
    assert [*savings, *ends] in tried and not any("parallel.nodes" in " ".join(overrides) for overrides in tried)


def test_beside_steps_on_the_cpu_one_rank_is_told_what_trains_less_on_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = Planner([(ROOM, ROOM // 50)])
    ends = [f"always_active.{part}=false" for part in ("embeddings", "norm", "head")]
    lean = ["parallel.activation_checkpointing=full", *ends]
    frozen_bytes = 0

    def only(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        plan = planner(config, gpu, overrides)
        trace = replace(plan.trace, persistent_bytes={"frozen_parameters": frozen_bytes})
        fits = "parallel.offload=all" in plan.overrides or {*ends, "sampler.active_layers=1"}.issubset(plan.overrides)
        return replace(plan, trace=replace(trace, peaks={"head": 1}) if fits else trace)

    monkeypatch.setattr(changes, "make_plan", only)
    monkeypatch.setattr(changes, "check_plan_streams", mock.Mock())
    config = load([*KEYS, "parallel.nproc_per_node=1", "train.global_batch_size=1"])
    fitting = [plan.overrides for plan in changes_that_fit(only(config, GPU)) if plan.fits]
    assert sorted(fitting) == [[*lean, "sampler.active_layers=1"], ["parallel.offload=all"]]
    frozen_bytes = ROOM + 1  # weights that can't stay there need no plan
    found = [plan.overrides for plan in changes_that_fit(only(config, GPU))]
    assert [*lean, "sampler.active_layers=1", "parallel.offload=frozen"] in found
    assert all(any("offload" in override for override in overrides) for overrides in found)


def test_masters_in_bfloat16_and_steps_in_the_backward_pass_are_tried_before_more_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = Planner([(100 * ROOM, ROOM)])
    monkeypatch.setattr(changes, "make_plan", planner)
    monkeypatch.setattr(changes, "vary", with_keys)
    changes_that_fit(planner(load([*KEYS, "train.global_batch_size=2"]), GPU))
    masters, machines = (
        next(place for place, overrides in enumerate(planner.made) if any(key in it for it in overrides))
        for key in ("precision.active=bfloat16", "parallel.nodes=2")
    )
    assert masters < machines
    said = {"optimizer.in_backward=true", "optimizer.grad_clip=0"}  # no gradient is clipped then
    assert any(said.issubset(overrides) for overrides in planner.made[:machines])
