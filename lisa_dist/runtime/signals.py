"""Signals that ask a run to stop: a flag for the training loop to read at its next step.

Handlers are installed before torch is imported, so that a signal in those seconds counts too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from types import FrameType

from lisa_dist.config import EXIT_FAILED

PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that this process gets when its parent dies
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_requested = False


def install_stop_handlers(*, ignore_interrupt: bool = False) -> None:
    """Let TERM, USR1 and INT set the flag that :func:`stop_requested` reads.

    Args:
        ignore_interrupt: under our own launcher, where Ctrl-C reaches the ranks too, but the launcher alone
            decides what it means and sends TERM.
    """
    global _requested
    _requested = False
    for number in STOP_SIGNALS:
        signal.signal(number, _set_flag)
    if ignore_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The launcher starts ranks with these signals held back; one that came meanwhile is delivered here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_at_signals() -> None:
    """Let TERM, USR1 and INT end this process again, at once: a command that has nothing to save waits for no step.

    Raises:
        KeyboardInterrupt: one has come before.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stop_requested():
        raise KeyboardInterrupt


def stop_requested() -> bool:
    """Whether this process was asked to stop; any one rank may be the only one that was."""
    return _requested


def stops_within(seconds: float) -> bool:
    """Wait until this process is asked to stop, at most so many seconds; return whether it was."""
    end = time.monotonic() + seconds
    while not stop_requested() and time.monotonic() < end:
        time.sleep(0.05)
    return stop_requested()


def ignore_stop_signals() -> None:
    """Ignore further stop signals: Slurm sends TERM to the others as soon as the first rank leaves with code 75."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _set_flag(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def die_with(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process signalled when its parent, the process ``parent``, dies, however that happens.

    Where another process is the parent by now, this one ends at once.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(EXIT_FAILED)
