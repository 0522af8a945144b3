from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.context import ForkProcess
from typing import Any

import pytest

from lisa_dist.data.workers import WorkerDiedError, map_in_order


def workers() -> list[Any]:
    """The processes that were forked here; ranks of other tests are spawned."""
    return [process for process in multiprocessing.active_children() if isinstance(process, ForkProcess)]


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


@pytest.mark.parametrize("num_proc", [1, 3])
def test_results_come_in_order_and_the_first_from_here(num_proc):
    results = list(map_in_order(square, range(20), num_proc, first_here=2))
    assert [result for result, _ in results] == [number * number for number in range(20)]
    processes = [process for _, process in results]
    assert set(processes[:2]) == {os.getpid()}
    assert len(set(processes[2:])) <= num_proc
    assert (os.getpid() in processes[2:]) == (num_proc == 1)
    assert not workers()


def test_few_chunks_start_no_process():
    assert {process for _, process in map_in_order(square, range(2), 3, first_here=2)} == {os.getpid()}


def test_what_the_function_raises_is_raised_here_with_its_traceback():
    def fail(number: int) -> int:
        raise LookupError(f"number {number}")

    with pytest.raises(LookupError, match="number 0") as raised:
        list(map_in_order(fail, range(3), 2))
    assert "in fail" in str(raised.value.__cause__)
    assert not workers()


def test_a_process_that_is_killed_is_an_error_and_not_waited_for():
    def die(number: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="killed"):
        list(map_in_order(die, range(5), 2))
    assert not workers()


def test_signals_to_the_whole_group_leave_the_processes_at_work():
    def signal_itself(number: int) -> int:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        return number

    assert list(map_in_order(signal_itself, range(4), 2)) == [0, 1, 2, 3]


def test_no_process_is_left_where_the_rest_is_not_wanted():
    results = map_in_order(square, range(10), 3)
    next(results)
    assert len(workers()) == 3
    results.close()
    assert not workers()
