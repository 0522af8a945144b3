"""A function called on chunk after chunk by processes of their own, with the results in the order of the chunks.

Processes are forked, so they start at once and hold what the function holds. They know no threads but their own: the
function must use neither torch nor a process group.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from lisa_dist.runtime.signals import STOP_SIGNALS, die_with

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # of this process, where it is a worker


class WorkerDiedError(Exception):
    """A process was killed from outside."""


def map_in_order(
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], num_proc: int, first_here: int = 0
) -> Generator[Result, None, None]:
    """Yield ``function(chunk)`` of every chunk, in order.

    Args:
        function: may be a closure; chunks and results are pickled.
        chunks: are read as processes become free.
        num_proc: how many processes; with 1 the function is called here.
        first_here: how many chunks are worked on here before processes start.

    Raises:
        WorkerDiedError: a process was killed.
    """
    source = iter(chunks)
    if num_proc == 1:
        yield from map(function, source)
        return
    yield from map(function, islice(source, first_here))
    # A forked process has none of tokenizers' threads, and would wait for them for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pool = ProcessPoolExecutor(num_proc, get_context("fork"), _start, (function, os.getpid()))
    at_work: deque[Future[Result]] = deque()
    try:
        for chunk in source:
            at_work.append(pool.submit(_call, chunk))
            if len(at_work) > num_proc:
                yield at_work.popleft().result()
        while at_work:
            yield at_work.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerDiedError("a process was killed, as the system does when memory runs out") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    for number in STOP_SIGNALS:  # they reach the whole process group; the parent alone decides what they mean
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)


def _call(chunk: Any) -> Any:
    return _function(chunk)
