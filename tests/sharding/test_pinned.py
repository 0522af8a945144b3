"""Host memory of a store that streams, with a stand-in for CUDA's driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from lisa_dist.config import UserError
from lisa_dist.sharding.pinned import PinnedPool

SIZE = 3 * 2**20 + 4096  # no power of two


class Driver:
    """Notes what is registered; refuses more than ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.registered: dict[int, int] = {}  # bytes by address
        self.calls = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0 and address not in self.registered
        self.calls += 1
        if sum(self.registered.values()) + size > self.most:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> None:
        del self.registered[address]

    def cudaGetErrorString(self, status: int) -> str:
        return {2: "out of memory"}[status]


@pytest.fixture
def driver() -> Iterator[Driver]:
    found = Driver(2 * SIZE)
    with mock.patch.object(torch.cuda, "cudart", lambda: found):
        yield found
    gc.collect()


def test_a_buffer_is_registered_once_to_the_byte_and_used_again_when_no_view_of_it_is_left(driver: Driver) -> None:
    pool = PinnedPool()
    first, second = pool.take(SIZE), pool.take(SIZE)
    addresses = {first.data_ptr(), second.data_ptr()}
    assert driver.registered == dict.fromkeys(addresses, SIZE)
    view = first[4096:].view(torch.bfloat16).detach()  # what a checkpoint in the background holds
    view.fill_(1)
    del first
    with pytest.raises(UserError):
        pool.take(SIZE)
    assert (view == 1).all() and driver.registered.keys() == addresses
    del view
    again = pool.take(SIZE)
    assert {again.data_ptr(), second.data_ptr()} == addresses and driver.calls == 3
    del pool, second
    assert again.data_ptr() in driver.registered, "what is in use outlives the pool"
    del again
    assert not driver.registered


def test_what_the_driver_refuses_is_told_with_its_size_and_a_remedy(driver: Driver) -> None:
    with pytest.raises(UserError) as refused:
        PinnedPool().take(3 * SIZE)
    message = str(refused.value)
    assert message.startswith("parallel.offload=frozen: no 9.0 MiB more of pinned host memory for a block (out of mem")
    assert "ulimit -l" in message and "parallel.offload=none" in message


def test_what_the_system_refuses_is_told_too(driver: Driver) -> None:
    with pytest.raises(UserError, match=r"no .* more of pinned host memory for a block \(.*memory"):
        PinnedPool().take(2**62)
    assert driver.calls == 0
