"""A store for the process group that holds nothing of an earlier attempt.

torchrun keeps one store over its restarts, in which a restarted rank finds the addresses of ranks that are gone
(https://github.com/pytorch/pytorch/issues/135712; with gloo and torch 2.13 it then says "connectFullMesh failed ...
Connection refused"). The count of restarts cannot tell attempts apart, for each node counts for itself. So the ranks
of an attempt agree on a name of their own, under which they meet.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.02


def meet(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """Return a fresh store, this rank and the number of ranks, by the launcher's variables. Waits for every rank."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return store, rank, world_size
    return PrefixStore(agree_on_name(store, rank, world_size, timeout), store), rank, world_size


def agree_on_name(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """Return a name that the ranks of this attempt alone know, whatever earlier ones left in ``store``.

    Each rank leaves a fresh greeting where its last one may still be. Rank 0 answers every greeting it sees with a
    fresh name, old ones for nothing, until every rank has confirmed that name.
    """
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        missing = set(range(1, world_size))
        while missing:
            for other in sorted(missing):
                if store.check([f"greeting/{other}"]):
                    store.set(f"answer/{store.get(f'greeting/{other}').decode()}", name)
                if store.check([f"confirmed/{name}/{other}"]):
                    missing.remove(other)
            _pause(end, f"rank 0 waited for ranks {sorted(missing)} to come up")
        return name
    greeting = uuid.uuid4().hex
    store.set(f"greeting/{rank}", greeting)
    while not store.check([f"answer/{greeting}"]):
        _pause(end, f"rank {rank} waited for rank 0 to come up")
    name = store.get(f"answer/{greeting}").decode()
    store.set(f"confirmed/{name}/{rank}", "")
    return name


def _pause(end: float, waited: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(waited)
    time.sleep(POLL_SECONDS)
