"""Real ranks for tests: processes of a gloo process group that stay for the whole session.

``run_on_ranks(4, function, *args)`` calls ``function(*args)`` on every rank and returns the results in rank
order. The function must be importable (module level). An exception on any rank is raised here with that
rank's traceback, and the next call has new processes.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.forkserver import FORKSERVER

TIMEOUT = 600  # seconds for one call

_pools: dict[int, RankPool] = {}


class RankPool:
    """``world_size`` processes in one process group."""

    def __init__(self, world_size: int) -> None:
        handle, store = tempfile.mkstemp(prefix="ranks-store-")
        os.close(handle)
        Path(store).unlink()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_serve, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call the function on every rank and return the results in rank order."""
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if failures and not pipe.poll(5):
                continue  # this rank waits in a collective for the one that failed
            if not pipe.poll(TIMEOUT):
                failures.append(f"rank {rank} did not answer within {TIMEOUT} s")
                continue
            try:
                failed, value = pipe.recv()
            except EOFError:
                failed, value = True, f"rank {rank} died"
            (failures if failed else results).append(value)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank of a process group of that size; see the module's docstring."""
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    try:
        return _pools[world_size].run(function, *args)
    except BaseException:
        _pools.pop(world_size).close()
        raise


def run_on_fresh_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """As :func:`run_on_ranks`, on ranks of its own: to measure memory, of which others have what tests before freed."""
    ranks = RankPool(world_size)
    try:
        return ranks.run(function, *args)
    finally:
        ranks.close()


@atexit.register
def _close_all() -> None:
    for pool in _pools.values():
        pool.close()


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    world, base = dist.distributed_c10d._world, dist.distributed_c10d._get_default_store()
    for number in itertools.count():
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        # Groups that calls make have the same names each time, which torch remembers, and keys of their own.
        world.group_count = 1
        world.pg_map[dist.group.WORLD] = ("gloo", dist.PrefixStore(f"call {number}", base))
        try:
            answer = (False, function(*args))
            made = [group for group in world.pg_map if group != dist.group.WORLD]
            if made:
                dist.barrier()  # a rank that leaves while another still connects to it breaks that one
                for group in made:
                    dist.destroy_process_group(group)
                gc.collect()  # models in circles keep groups, whose threads wake 100 times a second
            dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)
        except BaseException:
            answer = (True, f"rank {rank}:\n{traceback.format_exc()}")
        pipe.send(answer)
