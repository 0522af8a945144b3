"""The planned time of a step that streams, beside the copies that the store asked for, replayed at given rates."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_dist.config import Config
from lisa_dist.config.gpu import Gpu
from lisa_dist.config.sampling import FixedSamplerConfig
from lisa_dist.method.module import begin_period
from lisa_dist.planning.estimate import HOST_EFFICIENCY, MATRIX_EFFICIENCY, estimate
from lisa_dist.planning.simulation import simulate
from lisa_dist.sharding import ledger, streamed
from lisa_dist.sharding.link import Slot
from lisa_dist.training.step import train_step
from tests.support.ranks import run_on_ranks
from tests.support.simulated_link import SimulatedLink
from tests.support.small_training import build_and_load, make_config

RATE = 1e12  # operations a second
LENGTH = 32
HALF = 2.003  # GiB
TOGETHER = {"block_major": True}
ON_HOST = {**TOGETHER, "offload_activations": True}
FROZEN = {"embeddings": False, "norm": False, "head": False}


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.count += ledger._flops(operator, args, kwargs or {}, result)
        return result


class WatchedLink(SimulatedLink):
    """Notes what was asked for, of which slot, and after how many operations."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int, int, int]] = []
        self.operations = Operations()

    def _note(self, kind: str, slot: Slot, size: int = 0) -> None:
        self.events.append((kind, id(slot), size, self.operations.count))

    def _copy(self, slot: Slot, host: torch.Tensor) -> None:
        self._note("fetch", slot, host.nbytes)
        super()._copy(slot, host)

    def wait(self, slot: Slot) -> None:
        self._note("use", slot)
        super().wait(slot)

    def hand_back(self, slot: Slot) -> None:
        self._note("done", slot)
        super().hand_back(slot)

    def send(self, state: torch.Tensor, host: torch.Tensor) -> Any:
        self.events.append(("send", id(host), host.nbytes, self.operations.count))
        return super().send(state, host)

    def wait_sent(self, sent: Any) -> None:
        self.events.append(("sent", id(sent[1]), 0, self.operations.count))
        super().wait_sent(sent)


def configured(
    depth: int,
    slots: int,
    micro_batches: int,
    always_active: dict[str, bool],
    limit: float | None = None,
    block_major: bool = False,
    offload_activations: bool = False,
) -> Config:
    config = make_config(
        train={"micro_batch_size": 2, "global_batch_size": 2 * micro_batches},
        parallel={
            "offload": "frozen" if limit is None else "auto",
            "prefetch": slots - 1,
            "memory_limit": limit,
            "activation_checkpointing": "full",
            "block_major": block_major,
            "offload_activations": offload_activations,
        },
        always_active=always_active,
        data={"sequence_length": LENGTH},
    )
    config.model.architecture |= {"num_hidden_layers": depth, **({"hidden_size": 48} if block_major else {})}
    config.model.attention = "eager"  # whose products are counted as such
    config.sampler = FixedSamplerConfig(blocks=[13, depth - 5])
    return config


def events_of_a_step(config: Config) -> tuple[list[tuple[str, int, int, int]], int, int]:
    """What the store asked of its link in the second step of a period; operations and copied bytes of the step."""
    with mock.patch.object(streamed, "link_to", lambda device: WatchedLink()):
        train_module = build_and_load(config)
    link: Any = train_module.store.link  # type: ignore[attr-defined]
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    row = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH).expand(2, LENGTH).contiguous()}
    batch = [row] * (config.train.global_batch_size // 2)
    begin_period(train_module, 0)
    train_step(train_module, batch, 0, 2)
    link.events.clear()
    before = train_module.store.link_bytes
    with link.operations:
        train_step(train_module, batch, 1, 2)
    return link.events, link.operations.count, train_module.store.link_bytes - before


def replayed_seconds(events: list[tuple[str, int, int, int]], operations: int, link_rate: float) -> float:
    """The seconds of such a step after another: copies one after the other, as soon as their slot is free."""
    copied = sent = computed = 0.0
    free: dict[int, float] = {}
    filled: dict[int, float] = {}
    ends = []
    for _ in range(3):
        done = 0
        for kind, slot, size, count in events:
            computed += (count - done) / RATE
            done = count
            if kind == "fetch":
                copied = filled[slot] = max(copied, free.get(slot, 0.0)) + size / link_rate
            elif kind == "send":
                sent = filled[slot] = max(sent, computed) + size / link_rate
            elif kind in ("use", "sent"):
                computed = max(computed, filled.get(slot, 0.0))
            else:
                free[slot] = computed
        computed += (operations - done) / RATE
        ends.append(computed)
    return ends[2] - ends[1]


@pytest.mark.parametrize(
    ("depth", "slots", "micro_batches", "always_active", "limit", "keys"),
    [
        pytest.param(24, 2, 2, {}, None, {}, marks=pytest.mark.soak, id="2 slots, 2 micro-batches"),
        pytest.param(32, 3, 2, FROZEN, None, TOGETHER, id="3 slots, frozen ends, 2 micro-batches block by block"),
        pytest.param(24, 2, 3, {}, None, ON_HOST, marks=pytest.mark.soak, id="inputs of blocks in host memory"),
        pytest.param(32, 3, 1, FROZEN, None, {}, marks=pytest.mark.soak, id="3 slots, frozen ends"),
        pytest.param(32, 3, 1, FROZEN, HALF, {}, id="3 slots, frozen ends, half of the blocks stay"),
    ],
)
def test_a_streamed_step_is_planned_as_long_as_the_replayed_one(
    depth: int,
    slots: int,
    micro_batches: int,
    always_active: dict[str, bool],
    limit: float | None,
    keys: dict[str, bool],
) -> None:
    config = configured(depth, slots, micro_batches, always_active, limit, **keys)
    events, operations, copied = run_on_ranks(1, events_of_a_step, config)[0]
    trace = simulate(config)
    assert trace.work.flops == operations
    in_bf16 = dataclasses.replace(config, precision=dataclasses.replace(config.precision, compute="bfloat16"))
    alone = operations / RATE
    for share in (0.25, 0.7, 1.0, 1.4, 4.0):  # of the time of computing that copying takes
        rate = copied / (share * alone)
        gpu = Gpu("given rates", RATE / MATRIX_EFFICIENCY, 10**12, 1e30, 1e30, 1e30, rate / HOST_EFFICIENCY)
        planned = estimate(trace, gpu, in_bf16)
        assert planned.step_seconds == pytest.approx(replayed_seconds(events, operations, rate), rel=0.05)
        assert planned.step_seconds > max(1, share) * alone * 0.999
        assert planned.bound_by == ("computing" if share < 0.9 else "host") or share == 1.0
