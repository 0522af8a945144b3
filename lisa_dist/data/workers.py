"""A function called on chunk after chunk by processes of their own, with the results in the order of the chunks.

Processes are forked, so they start at once and hold what the function holds. They know no threads but their own: the
function must use neither torch nor a process group.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from lisa_dist.runtime.signals import STOP_SIGNALS, die_with

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


class WorkerDiedError(Exception):
    """A process was killed from outside."""


def map_in_order(
    function: Callable[[Chunk], Result], chunks: Iterable[Chunk], num_proc: int, first_here: int = 0
) -> Generator[Result, None, None]:
    """Yield ``function(chunk)`` of every chunk, in order.

    Args:
        function: may be a closure; chunks and results are pickled.
        chunks: are read as processes become free. Where reading raises, the results of earlier chunks come first.
        num_proc: how many processes; with 1 the function is called here.
        first_here: how many chunks are worked on here before processes start.

    Raises:
        WorkerDiedError: a process was killed.
        RuntimeError: the function raised; its traceback is the message.
    """
    processes: list[ForkProcess] = []
    at_work: deque[Connection] = deque()  # each has one chunk, so neither side waits for the other to read
    failure: Exception | None = None
    source = iter(chunks)
    done = 0
    try:
        while True:
            try:
                chunk = next(source)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            if num_proc == 1 or done < first_here:
                done += 1
                yield function(chunk)
            elif len(processes) < num_proc:
                process, pipe = _start(function)
                processes.append(process)
                pipe.send(chunk)
                at_work.append(pipe)
            else:
                pipe = at_work.popleft()
                result: Result = _receive(pipe)
                pipe.send(chunk)
                at_work.append(pipe)
                yield result
        for pipe in at_work:
            yield _receive(pipe)
        if failure is not None:
            raise failure
    finally:
        for process in processes:
            process.kill()
            process.join()


def _start(function: Callable[[Chunk], Result]) -> tuple[ForkProcess, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(function, theirs, os.getpid()), daemon=True
    )
    with _single_threaded_tokenizers():
        process.start()
    theirs.close()
    return process, ours


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Fork with tokenizers' threads off: a child has none of them, and would wait for them for ever."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _serve(function: Callable[[Chunk], Result], pipe: Connection, parent: int) -> None:
    """Answer chunks until the parent kills this process, or dies."""
    for number in STOP_SIGNALS:  # they reach the whole process group; the parent alone decides what they mean
        signal.signal(number, signal.SIG_IGN)
    die_with(parent)
    while True:
        chunk = pipe.recv()
        try:
            result, trace = function(chunk), ""
        except Exception:
            result, trace = None, traceback.format_exc()
        pipe.send((result, trace))


def _receive(pipe: Connection) -> Any:
    try:
        result, trace = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise WorkerDiedError("a process was killed, as the system does when memory runs out") from error
    if trace:
        raise RuntimeError(trace)
    return result
