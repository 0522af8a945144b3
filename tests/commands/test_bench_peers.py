"""What ``bench.compare=[peer_...]`` runs beside the trainer: the same steps by transformers' Trainer and PEFT."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from lisa_dist.commands.bench import command as bench
from lisa_dist.commands.bench.peers import PEERS, PeerTarget, check_peer, peer_full, peer_lisa, peer_lora
from lisa_dist.commands.bench.steps import StepClock
from lisa_dist.commands.bench.targets import MethodTarget
from lisa_dist.config import UserError
from lisa_dist.config.loading import load
from tests.support.bench import BLOCKS, TINY, printed_by_bench
from tests.support.ranks import run_on_ranks
from tests.support.small_training import full_parameters

EXACT = [
    *TINY,
    "precision.compute=float32",
    "precision.frozen=float32",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
]


def weights_after(overrides: list[str], peer: str | None, steps: int) -> dict[str, torch.Tensor]:
    """What a target has trained after some steps of the same data, by name. Runs on a rank."""
    config = load(overrides)
    batches = bench.bench_batches(config)
    target: Any = (PEERS[peer] if peer else MethodTarget)(config, batches)
    clock = StepClock(batches)
    target.switch()
    target.make_steps(clock, steps)
    assert len(clock.take()) == steps
    if peer:
        return {name: parameter.detach() for name, parameter in target.trainer.model.named_parameters()}
    return full_parameters(target.train_module)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_alone_makes_the_very_steps_of_full_training(ranks: int) -> None:
    both = partial(run_on_ranks, ranks, weights_after, [*EXACT, "method=full", "optimizer.lr=0.01"])
    ours, theirs = both(None, 3)[0], both("peer_full", 3)
    for name, weight in ours.items():
        assert (weight - theirs[0][name]).norm() < 1e-4 * weight.norm(), name
        assert all(torch.equal(theirs[0][name], rank[name]) for rank in theirs)


def moved_by_period(periods: int) -> list[tuple[set[str], set[str]]]:
    """Of each period of peer_lisa what moved, and what has optimizer state after it. Runs on a rank."""
    config = load([*EXACT, "sampler.active_layers=1"])
    batches = bench.bench_batches(config)
    target = peer_lisa(config, batches)
    model: nn.Module = target.trainer.model
    found = []
    for _ in range(periods):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        target.switch()
        target.make_steps(StepClock(batches), 2)
        state = target.trainer.optimizer.state
        found.append(
            (
                {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])},
                {name for name, parameter in model.named_parameters() if parameter in state},
            )
        )
    return found


def test_the_lisa_callback_trains_one_block_and_the_ends_and_keeps_every_state() -> None:
    (periods,) = run_on_ranks(1, moved_by_period, 4)
    blocks = [{int(name.split(".")[2]) for name in moved if ".layers." in name} for moved, _ in periods]
    assert all(len(drawn) == 1 for drawn in blocks) and len(set.union(*blocks)) > 1
    for moved, _ in periods:
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved
    with_state = {int(name.split(".")[2]) for name in periods[-1][1] if ".layers." in name}
    assert with_state == set.union(*blocks)


def adapters_of_the_peer(overrides: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what PEFT's peer trains. Runs on a rank."""
    config = load(overrides)
    batches = bench.bench_batches(config)
    target: PeerTarget = peer_lora(config, batches)
    before = {name: weight.detach().clone() for name, weight in target.trainer.model.named_parameters()}
    target.make_steps(StepClock(batches), 2)
    for name, weight in target.trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad or ".lora_A." in name
        assert weight.requires_grad or weight.dtype == torch.bfloat16 or weight.ndim == 1
    trained = [(name, weight) for name, weight in target.trainer.model.named_parameters() if weight.requires_grad]
    return {name: (tuple(weight.shape), weight.dtype) for name, weight in trained}


def test_pefts_adapters_are_those_of_the_configured_update() -> None:
    (chosen,) = run_on_ranks(1, adapters_of_the_peer, [*TINY, "method=lora", "update.rank=4"])
    (usual,) = run_on_ranks(1, adapters_of_the_peer, [*TINY, "method=full"])
    assert len(chosen) == len(usual) == 2 * 7 * BLOCKS  # A and B of seven matrices a block
    assert {min(shape) for shape, _ in chosen.values()} == {4}
    assert {min(shape) for shape, _ in usual.values()} == {16}
    assert {dtype for _, dtype in (*chosen.values(), *usual.values())} == {torch.float32}


def module_after_a_peer(overrides: list[str]) -> list[bool]:
    """Whether what a training puts into transformers' modules is there in it, and after it. Runs on a rank."""
    config = load(overrides)
    batches = bench.bench_batches(config)
    target = peer_full(config, batches)
    train, seen, original = target.trainer.train, [], modeling_llama.apply_rotary_pos_emb

    def with_liger() -> Any:  # which replaces functions and classes of the module, not of the model
        modeling_llama.apply_rotary_pos_emb = lambda *args, **kwargs: original(*args, **kwargs)
        trained = train()
        seen.append(modeling_llama.apply_rotary_pos_emb is not original)
        return trained

    target.trainer.train = with_liger
    target.make_steps(StepClock(batches), 1)
    return [*seen, modeling_llama.apply_rotary_pos_emb is not original]


def test_a_peers_kernels_are_not_those_of_other_targets() -> None:
    assert run_on_ranks(1, module_after_a_peer, TINY) == [[True, False]]


def test_peers_stand_in_the_same_table() -> None:
    (printed,) = run_on_ranks(
        1, printed_by_bench, [*EXACT, "bench.compare=[peer_full]", "parallel.activation_checkpointing=full"]
    )
    (row,) = [line for line in printed.splitlines() if line.startswith("│ peer_full")]
    assert "±" in row and "iB" in row
    assert "kernels: lisa eager, peer_full eager" in printed


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("optimizer=lion", "optimizer.name=lion.*choose optimizer.name=adamw"),
        ("model.quantization=nf4", "choose model.quantization=none"),
        ("parallel.offload=all", "choose parallel.offload=none"),
        ("parallel.activation_checkpointing=selective", "choose parallel.activation_checkpointing=none or full"),
    ],
)
def test_what_the_trainer_does_not_have_is_refused(chosen: str, message: str) -> None:
    with pytest.raises(UserError, match=f"bench.compare=peer_full: is no comparison with .*{message}"):
        check_peer("peer_full", load([*TINY, "method=lora", chosen]))


def test_a_missing_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else there(name))
    with pytest.raises(UserError, match=r"peer_full: needs accelerate, .* run pip install accelerate"):
        peer_full(load(TINY), None)  # type: ignore[arg-type]


def refused_on_ranks() -> str:
    """What peer_lisa says on several ranks. Runs on a rank."""
    config = load([*TINY, "bench.compare=[peer_lisa]"])
    with pytest.raises(UserError) as caught:
        peer_lisa(config, bench.bench_batches(config))
    return str(caught.value)


def test_the_lisa_callback_is_refused_on_several_ranks() -> None:
    assert all("parallel.nproc_per_node=1" in told for told in run_on_ranks(2, refused_on_ranks))
