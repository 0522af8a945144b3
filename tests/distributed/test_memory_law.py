"""Every live byte of a rank, over ten periods; and what rounding does to updates that are smaller than it."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lisa_dist.config.optimization import PARTS
from lisa_dist.method.module import TrainModule, begin_period
from lisa_dist.runtime import distributed
from lisa_dist.sharding import fsdp2
from lisa_dist.training.step import accumulate_gradients, train_step
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, make_config, make_global_batches

BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}


def live_storages() -> dict[int, tuple[int, str]]:
    """Bytes and shape of the storage of every tensor that Python knows and that gc did not freeze, by address."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        # By type: isinstance asks lazy modules for their class, which imports them.
        if issubclass(type(item), torch.Tensor) and not issubclass(type(item), DTensor) and not item.is_meta:
            memory = item.untyped_storage()
            if memory.nbytes():
                found[memory.data_ptr()] = (memory.nbytes(), f"{item.dtype} {tuple(item.shape)}")
    return found


def explained_storages(train_module: TrainModule) -> dict[str, dict[int, int]]:
    """Bytes of the storages that the law allows, by kind and address."""
    kinds: dict[str, dict[int, int]] = {kind: {} for kind in ("frozen", "active", "gradients", "moments", "steps")}
    handles = train_module.store.handles
    for fsdp_param, _ in handles.values():
        parameter = fsdp_param.sharded_param
        memory = fsdp_param._sharded_param_data.untyped_storage()
        kinds["active" if parameter.requires_grad else "frozen"][memory.data_ptr()] = memory.nbytes()
        if parameter.grad is not None:
            memory = parameter.grad.to_local().untyped_storage()
            kinds["gradients"][memory.data_ptr()] = memory.nbytes()
    for tensor in train_module.optimizer.moment_tensors().values():
        memory = tensor.to_local().untyped_storage()
        kinds["moments"][memory.data_ptr()] = memory.nbytes()
    for state in train_module.optimizer._stepper.state.values():
        kinds["steps"][state["step"].untyped_storage().data_ptr()] = 4
    ranks = train_module.store.mesh.mesh
    kinds["mesh"] = {ranks.untyped_storage().data_ptr(): ranks.nbytes}
    kinds["buffers"] = {b.untyped_storage().data_ptr(): b.nbytes for b in train_module.store.module.buffers()}
    return kinds


def check_that_all_is_explained(explained: set[int]) -> None:
    """No storage is there but these. gloo's threads let go of a collective's tensors a moment after its end."""
    deadline = time.monotonic() + 60
    while unexplained := [text for address, text in live_storages().items() if address not in explained]:
        assert time.monotonic() < deadline, f"nothing explains {unexplained}"
        time.sleep(0.05)


def account(train_module: TrainModule, before: set[int]) -> dict[str, Any]:
    """Bytes by kind; no storage may be left that no kind explains."""
    fsdp2.reshard_all(train_module.store.module)
    explained = explained_storages(train_module)
    addresses = {address for kind in explained.values() for address in kind}
    check_that_all_is_explained(addresses | before)
    padded = {
        trained: sum(
            fsdp_param.padded_sharded_param_size.numel()
            for fsdp_param, _ in train_module.store.handles.values()
            if fsdp_param.sharded_param.requires_grad == trained
        )
        for trained in (False, True)
    }
    return {
        "bytes": {kind: sum(found.values()) for kind, found in explained.items()},
        "padded": padded,
        "own": sum(tensor.to_local().numel() for tensor in train_module.optimizer.moment_tensors().values()) // 2,
        "trained": len(train_module.optimizer.parameters),
        "blocks": list(train_module.active.blocks),
    }


def ten_periods() -> list[dict[str, Any]]:
    """Account after each switch and after each last backward pass of a period. Runs on every rank."""
    train_module = build_and_load(make_config(precision=BF16, sampler={"period": 2}))
    batches = make_global_batches(1)[0][distributed.rank() :: distributed.world_size()]
    before = {tensor.untyped_storage().data_ptr() for batch in batches for tensor in batch.values()}
    seen = []
    for period in range(10):
        begin_period(train_module, period)
        switched = account(train_module, before)
        train_step(train_module, batches, 2 * period, 20)
        accumulate_gradients(train_module, batches)
        seen.append({"switched": switched, "accumulated": account(train_module, before)})
        train_module.optimizer.step(dict.fromkeys(PARTS, 1e-3))
    assert isinstance(train_module.store.module, FSDPModule)
    return seen


def ten_periods_alone() -> list[dict[str, Any]]:
    """The same, of which nothing is counted that was there before. Runs on every rank."""
    gc.collect()
    gc.freeze()
    try:
        return ten_periods()
    finally:
        gc.unfreeze()


def test_every_byte_is_explained_and_nothing_grows_over_ten_periods() -> None:
    for rows in run_on_ranks(2, ten_periods_alone):
        assert len({tuple(row["switched"]["blocks"]) for row in rows}) > 3
        for row in rows:
            for moment in ("switched", "accumulated"):
                found = row[moment]
                # Shards of matrices whose rows do not divide are padded to the largest; moments are not.
                assert found["bytes"]["frozen"] == 2 * found["padded"][False]
                assert found["bytes"]["active"] == 4 * found["padded"][True]
                assert found["bytes"]["moments"] == 8 * found["own"]
                assert found["bytes"]["steps"] == 4 * found["trained"]
            assert row["switched"]["bytes"]["gradients"] == 0
            assert row["accumulated"]["bytes"]["gradients"] == 4 * row["accumulated"]["padded"][True]
        assert all(row["switched"]["bytes"] == rows[0]["switched"]["bytes"] for row in rows)
        assert all(row["accumulated"]["bytes"] == rows[0]["accumulated"]["bytes"] for row in rows)


def tiny_periods(count: int, frozen: str, on_freeze: str, replicate: int) -> dict[str, Any]:
    """A step at a tiny learning rate in each of ``count`` periods: how far two blocks moved. Runs on every rank."""
    config = make_config(
        precision={"frozen": frozen, "on_freeze": on_freeze},
        sampler={"period": 1, "active_layers": 1},
        optimizer={"lr": 2e-5, "weight_decay": 0.0},
        scheduler={"name": "constant", "warmup_steps": 0},
        parallel={"replicate": replicate},
    )
    config.model.architecture["num_hidden_layers"] = 2
    train_module = build_and_load(config)
    names = [name for block in range(2) for name in train_module.store.block_parameters(block)]

    def shards() -> torch.Tensor:
        fsdp2.reshard_all(train_module.store.module)
        return torch.cat([train_module.store.parameter(name).detach().to_local().float().flatten() for name in names])

    # The weights are those that bf16 can hold, in every setting.
    for name in names:
        shard = train_module.store.parameter(name).detach().to_local()
        shard.copy_(shard.bfloat16())
    start = shards()
    batch = make_global_batches(1)[0][distributed.rank()]
    for period in range(count):
        begin_period(train_module, period)
        train_step(train_module, [batch], period, count)
    begin_period(train_module, count)
    return {"moved": shards() - start, "end": shards(), "shard": train_module.store.shard_index}


def test_stochastic_rounding_keeps_updates_that_nearest_loses() -> None:
    exact = torch.cat([rank["moved"] for rank in run_on_ranks(2, tiny_periods, 15, "float32", "nearest", 1)])
    kept = {}
    for on_freeze in ("stochastic", "nearest"):
        ranks = run_on_ranks(2, tiny_periods, 15, "bfloat16", on_freeze, 1)
        moved = torch.cat([rank["moved"] for rank in ranks])
        kept[on_freeze] = float(moved @ exact / (exact @ exact))  # the share of the exact way
    assert abs(kept["stochastic"] - 1) < 0.05, kept
    assert kept["nearest"] < 0.2, kept


def test_rounding_is_the_same_on_replicas_and_differs_between_shards() -> None:
    ranks = run_on_ranks(4, tiny_periods, 4, "bfloat16", "stochastic", 2)
    by_shard: dict[int, list[torch.Tensor]] = {}
    for rank in ranks:
        by_shard.setdefault(rank["shard"], []).append(rank["end"])
    assert sorted(by_shard) == [0, 1] and all(len(replicas) == 2 for replicas in by_shard.values())
    assert all(torch.equal(*replicas) for replicas in by_shard.values())
