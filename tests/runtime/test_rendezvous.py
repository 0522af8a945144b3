"""Ranks of one attempt meet, whatever an earlier attempt left in the store."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from lisa_dist.runtime.rendezvous import agree_on_name

SECOND = datetime.timedelta(seconds=1)


def attempt(store: HashStore, ranks: list[int], world_size: int = 3) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        waiting = [pool.submit(agree_on_name, store, rank, world_size, 20 * SECOND) for rank in ranks]
        return [future.result() for future in waiting]


def test_every_attempt_has_a_name_of_its_own() -> None:
    store = HashStore()
    names = [attempt(store, [2, 0, 1]) for _ in range(3)]
    assert all(len(set(of_attempt)) == 1 for of_attempt in names), "ranks of one attempt agree"
    assert len({of_attempt[0] for of_attempt in names}) == 3


def test_an_attempt_that_lost_a_rank_does_not_confuse_the_next() -> None:
    store = HashStore()
    with pytest.raises(TimeoutError, match=r"rank 0 waited for ranks \[2\]"):
        agree_on_name_without(store)
    assert len(set(attempt(store, [0, 1, 2]))) == 1


def agree_on_name_without(store: HashStore) -> None:
    """Rank 1 comes up and is answered, rank 2 never comes."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(agree_on_name, store, 1, 3, 20 * SECOND)
        try:
            agree_on_name(store, 0, 3, SECOND)
        finally:
            other.result()
