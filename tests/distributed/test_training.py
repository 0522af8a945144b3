"""The trainer's steps on real ranks against LISA in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lisa_dist.config import Config
from lisa_dist.config.optimization import PARTS
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.method.module import begin_period, count_persistent_bytes
from lisa_dist.method.sampling import build_sampler
from lisa_dist.method.switch import DisagreementError, RankSynchronizedSampler, checksum, verify_agreement
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding import fsdp2
from lisa_dist.sharding.sharded import ShardedStore
from lisa_dist.training.step import accumulate_gradients
from tests.support.families import FAMILIES, tiny_config
from tests.support.ranks import run_on_ranks
from tests.support.small_training import (
    PERIOD,
    ROUNDED,
    build_and_load,
    changed_by_step,
    make_config,
    make_global_batches,
    to_be_trained,
    train_on_rank,
    train_reference,
)


@pytest.mark.parametrize(
    ("world_size", "parallel", "tied"),
    [
        pytest.param(1, {}, False, id="1"),
        pytest.param(1, {}, True, id="1, tied", marks=pytest.mark.soak),
        pytest.param(2, {}, False, id="2"),
        pytest.param(2, {}, True, id="2, tied", marks=pytest.mark.soak),
        pytest.param(4, {}, False, id="4", marks=pytest.mark.soak),
        pytest.param(4, {"replicate": 2}, False, id="2 x 2"),
        pytest.param(4, {"replicate": 2, "optimizer_shard": "world"}, True, id="2 x 2, masters apart, tied"),
    ],
)
def test_three_periods_equal_plain_pytorch(world_size: int, parallel: dict[str, Any], tied: bool) -> None:
    # Some steps are clipped, which hides what gradients are divided by, and some are not.
    config = make_config(train={"seed": 5}, optimizer={"grad_clip": 3.5}, parallel=parallel)
    config.model.architecture["tie_word_embeddings"] = tied
    results = run_on_ranks(world_size, train_on_rank, config)
    first = results[0]
    sampler = build_sampler(config.sampler, 5, seed=5)
    assert first["draws"] == [sampler.draw(period) for period in range(3)]
    assert first["draws"][0] != first["draws"][1], "a seed whose draws differ is needed for this test"
    assert min(first["grad_norms"]) < 3.5 < max(first["grad_norms"])
    reference, losses = train_reference(config, first["initial"], first["draws"])
    assert first["losses"] == pytest.approx(losses, rel=1e-5)
    for name, parameter in first["final"].items():
        error = (parameter - reference[name]).norm() / reference[name].norm()
        assert error < ROUNDED, f"{name}: relative error {error}"
    for other in results[1:]:
        assert other["losses"] == first["losses"] and other["draws"] == first["draws"]


def test_bf16_storage_follows_the_fp32_losses_and_reduces_in_fp32() -> None:
    plain = run_on_ranks(2, train_on_rank, make_config())[0]
    mixed = run_on_ranks(2, train_on_rank, make_config(precision={"frozen": "bfloat16", "compute": "bfloat16"}))[0]
    assert mixed["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert mixed["losses"] != plain["losses"]
    assert all(dtypes == {torch.float32} for dtypes in mixed["reduce_dtypes"])


def storage_over_periods(config: Config) -> list[dict[str, Any]]:
    """Dtypes, bytes and frozen bits around each switch. Runs on every rank."""
    train_module = build_and_load(config)
    store, seen = train_module.store, []
    for step, micro_batches in enumerate(make_global_batches()):
        if step % PERIOD == 0:
            begin_period(train_module, step // PERIOD)
            before = {name: local_shard(store.parameter(name)).clone() for name in store.names}
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        accumulate_gradients(train_module, mine)
        counted = count_persistent_bytes(train_module)
        parameters = {name: store.parameter(name) for name in store.names}
        trained, sharded = set(train_module.optimizer.parameters), isinstance(store, ShardedStore)
        seen.append(
            {
                "blocks": list(train_module.active.blocks),
                "counted": counted,
                "looked_up": sum(local_shard(parameters[name]).numel() for name in store.parameters_of("embeddings")),
                "trained_elements": sum(local_shard(parameters[name]).numel() for name in trained),
                "frozen_elements": sum(local_shard(p).numel() for name, p in parameters.items() if name not in trained),
                "dtypes_right": all(
                    store.master(name).dtype == (torch.float32 if name in trained else torch.bfloat16)
                    and (sharded or p.dtype == torch.bfloat16 or "embed_tokens" in name)
                    for name, p in parameters.items()
                ),
                "gradients_right": all(
                    (store.master(name).grad is not None) == (name in trained) for name in parameters
                ),
                "moments_on_mesh": all(
                    isinstance(moment, DTensor) and moment.device_mesh == store.mesh if sharded else True
                    for moment in train_module.optimizer.moment_tensors().values()
                ),
                "counts": train_module.optimizer.step_counts(),
            }
        )
        train_module.optimizer.step(dict.fromkeys(PARTS, 1e-3))
        fsdp2.reshard_all(store.module)
        seen[-1]["frozen_bits_kept"] = all(
            torch.equal(before[name], local_shard(p)) for name, p in parameters.items() if name not in trained
        )
        seen[-1]["trained_bits_changed"] = any(
            not torch.equal(before[name], local_shard(p)) for name, p in parameters.items() if name in trained
        )
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_memory_law_holds_on_every_rank_after_every_switch(world_size: int) -> None:
    config = make_config(precision={"frozen": "bfloat16", "compute": "bfloat16"})
    for rank_rows in run_on_ranks(world_size, storage_over_periods, config):
        for step, row in enumerate(rank_rows):
            active, frozen = row["trained_elements"], row["frozen_elements"]
            copied = active - row["looked_up"] if world_size == 1 else 0
            assert row["counted"] == {
                "frozen_parameters": 2 * frozen,
                "gradients": 4 * active,
                "optimizer_state": 8 * active,
                "active_parameters": 2 * copied + 4 * (active - copied),
                **({"masters": 4 * copied} if copied else {}),
            }
            assert row["dtypes_right"] and row["gradients_right"] and row["moments_on_mesh"]
            assert row["frozen_bits_kept"] and row["trained_bits_changed"]
            # Bias correction restarts for a block that was thawed, and goes on for the rest.
            for name, count in row["counts"].items():
                since = step % PERIOD
                block = int(name.split(".")[2]) if ".layers." in name else None
                first = step - since
                while block is not None and first > 0 and block in rank_rows[first - 1]["blocks"]:
                    first -= PERIOD
                assert count == (step if block is None else step - first), name
    assert len({tuple(row["blocks"]) for row in rank_rows}) > 1


def draw_with_other_seeds(seeds: list[int]) -> list[list[int]]:
    """Each rank seeds its sampler differently. Runs on every rank."""
    own = UniformSamplerConfig(active_layers=2, seed=seeds[distributed.rank()])
    sampler = RankSynchronizedSampler(build_sampler(own, 8))
    return [sampler.draw(period) for period in range(20)]


def test_ranks_seeded_differently_agree_on_every_set() -> None:
    drawn = run_on_ranks(4, draw_with_other_seeds, [1, 2, 3, 4])
    alone = [build_sampler(UniformSamplerConfig(active_layers=2, seed=seed), 8) for seed in (1, 2)]
    assert all(other == drawn[0] for other in drawn)
    assert drawn[0] == [alone[0].draw(period) for period in range(20)]
    assert drawn[0] != [alone[1].draw(period) for period in range(20)]


def disagree() -> str:
    """Rank 1 holds another set than it was sent. Runs on every rank."""
    blocks = [0, 3] if distributed.rank() == 1 else [0, 2]
    try:
        verify_agreement(7, blocks, checksum(7, [0, 2]))
    except DisagreementError as error:
        return str(error)
    return "no error"


def test_a_disagreement_names_ranks_and_sets() -> None:
    for message in run_on_ranks(2, disagree):
        assert "period 7" in message and "rank 0: [0, 2]" in message and "rank 1: [0, 3] (damaged)" in message


def train_two_periods(architecture: dict[str, Any]) -> list[tuple[set[str], set[str]]]:
    """A family's tiny instance in bf16 storage, two periods of a step: what was to change in each, and what did.

    Runs on every rank.
    """
    config = make_config(
        precision={"frozen": "bfloat16", "compute": "bfloat16"},
        sampler={"period": 1, "active_layers": 1},
        model={"architecture": architecture},
    )
    train_module = build_and_load(config)
    found = []
    for step, micro_batches in enumerate(make_global_batches(2)):
        begin_period(train_module, step)
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        found.append((to_be_trained(train_module), changed_by_step(train_module, mine, step, 2)))
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_two_periods(family: str) -> None:
    """What is active changes, all of it, and nothing else does."""
    first, second = run_on_ranks(2, train_two_periods, tiny_config(family).to_dict())
    assert len(first) == 2
    for (wanted, here), (_, there) in zip(first, second):
        assert here | there == wanted
