"""Signals become a flag, and after a stop they are ignored."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lisa_dist.runtime.signals import (
    STOP_SIGNALS,
    ignore_stop_signals,
    install_stop_handlers,
    stop_requested,
    stops_within,
)


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag(number: int) -> None:
    install_stop_handlers()
    assert not stop_requested()
    os.kill(os.getpid(), number)
    assert stop_requested()
    install_stop_handlers()
    assert not stop_requested()


def test_a_signal_held_back_before_is_delivered() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # To this thread: one of a library that an earlier test used does not hold it back, and would end the process.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    install_stop_handlers()
    assert stop_requested()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)


def test_waiting_for_a_stop_ends_with_it_or_with_the_time() -> None:
    install_stop_handlers()
    assert not stops_within(0.01)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert stops_within(60)


def test_under_our_launcher_control_c_is_the_launchers() -> None:
    install_stop_handlers(ignore_interrupt=True)
    os.kill(os.getpid(), signal.SIGINT)
    assert not stop_requested()


def test_signals_are_ignored_after_the_stop() -> None:
    install_stop_handlers()
    ignore_stop_signals()
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert not stop_requested()
