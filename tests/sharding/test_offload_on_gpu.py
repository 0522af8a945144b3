"""Where parameters lie with a GPU, which CPU ranks can't show: there host and device are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from lisa_dist.config.updates import FullRankUpdateConfig, LoraUpdateConfig, LowRankUpdateConfig, UpdateConfig
from lisa_dist.method.module import TrainModule, add_trained_params, allocate, begin_period, build_train_module
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.masters import WorldMastersStore
from lisa_dist.sharding.sharded import ShardedStore
from lisa_dist.sharding.streamed import StreamedStore
from tests.support.imagined_gpu import GPU, imagined_gpu
from tests.support.small_training import make_config

# No random bits are to be had of a GPU that is not there, so rounding is to nearest.
MIXED = {"frozen": "bfloat16", "compute": "bfloat16", "on_freeze": "nearest"}
STORES: dict[str, tuple[int, dict[str, Any], type]] = {
    "one rank": (1, {}, ShardedStore),
    "sharded": (2, {}, ShardedStore),
    "hybrid": (4, {"replicate": 2}, ShardedStore),
    "masters over all": (4, {"replicate": 2, "optimizer_shard": "world"}, WorldMastersStore),
}
UPDATES = [FullRankUpdateConfig, LoraUpdateConfig, LowRankUpdateConfig]


def check_places(train_module: TrainModule, offload: str) -> None:
    """What says that it is on a device has its shard there: what trains and its state, and what is frozen."""
    store, optimizer = train_module.store, train_module.optimizer
    frozen = {name: store.parameter(name) for name in store.names if not store.parameter(name).requires_grad}
    trained = {name: store.parameter(name) for name in optimizer.parameters}
    kept = {f"master of {name}": parameter for name, parameter in optimizer.parameters.items()}
    kept |= {f"stepped of {name}": entry.stepped for name, entry in optimizer.trained.items()}
    kept |= optimizer.moment_tensors()
    assert frozen and trained
    streams = isinstance(store, StreamedStore)
    for place, tensors in ((True, frozen), (offload == "all", {**trained, **kept})):
        for name, tensor in tensors.items():
            stays = streams and "lora_" in name  # adapters are small
            assert tensor.device == local_shard(tensor).device, name
            assert tensor.device.type == ("cpu" if place and not stays else "cuda"), name
            assert isinstance(tensor, DTensor) != streams, name


def cases() -> Iterator[Any]:
    """What is not refused by name; always each pair of two of the three once, the others by ``make soak``."""
    for (row, kind), (column, offload), (number, update) in itertools.product(
        enumerate(STORES), enumerate(("frozen", "all")), enumerate(UPDATES)
    ):
        over_all = kind == "masters over all"
        if over_all and (offload == "all" or not update.supports_sharded_masters):
            continue
        marks = () if over_all or (row + column + number) % 3 == 1 else pytest.mark.soak
        yield pytest.param(kind, offload, update, marks=marks, id=f"{kind}-{offload}-{update.name}")


@pytest.mark.parametrize(("kind", "offload", "update"), cases())
def test_every_shard_lies_where_its_tensor_says(kind: str, offload: str, update: type[UpdateConfig]) -> None:
    ranks, parallel, expected = STORES[kind]
    config = make_config(parallel=parallel | {"offload": offload}, precision=MIXED)
    config.model.architecture["num_hidden_layers"], config.update = 3, update()
    with imagined_gpu(ranks) as mode:
        train_module = build_train_module(config)
        assert type(train_module.store) is (StreamedStore if ranks == 1 and offload == "frozen" else expected)
        with mode, torch.no_grad():
            allocate(train_module, [], GPU)
            add_trained_params(train_module)
            train_module.store.tensors()
            for period in range(2):
                begin_period(train_module, period)
                check_places(train_module, offload)
