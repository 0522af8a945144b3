"""What a signal to the launcher means: the first asks the ranks to stop and save, the second kills them.

Where there is nothing to save, the first kills them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from lisa_dist.config import EXIT_FAILED, EXIT_INTERRUPTED
from lisa_dist.runtime.signals import STOP_SIGNALS

POLL_SECONDS = 0.1
END = 0  # no signal has this number


class StopWatcher:
    """While entered, a thread of its own passes INT, TERM and USR1 on to the ranks, whatever the main thread waits for.

    Ranks are known by the files ``started_RANK_PID`` and, once they have ended, ``outcome_RANK.json``. They
    start with these signals held back and take them up when their handlers stand, so that none is lost while
    they import torch. A second Ctrl-C, or the same signal again, kills; where the ranks save nothing, the first does.
    """

    def __init__(self, outcome_dir: Path, *, saves: bool) -> None:
        self.outcome_dir = outcome_dir
        self.saves = saves
        self.received: list[int] = []
        self.kill = False
        self.asked: set[int] = set()  # process ids that were asked to stop
        self.thread = threading.Thread(target=self._watch, name="stop-watcher", daemon=True)

    def __enter__(self) -> StopWatcher:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.old_handlers: dict[int, Any] = {
            number: signal.signal(number, lambda number, frame: None) for number in STOP_SIGNALS
        }
        self.old_wakeup = signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        resource_tracker.ensure_running()  # multiprocessing's helper process: its start would lift the mask
        # Before the mask, which threads and child processes inherit; this process's own parent may have set it too.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self.thread.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *failure: object) -> None:
        os.write(self.write_end, bytes([END]))
        self.thread.join()
        signal.set_wakeup_fd(self.old_wakeup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        os.close(self.read_end)
        os.close(self.write_end)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self.read_end], [], [], POLL_SECONDS if self.received else None)
            for number in os.read(self.read_end, 64) if ready else b"":
                if number == END:
                    return
                if number in STOP_SIGNALS:
                    self._take(number)
            if self.received:
                self._pass_on()

    def _take(self, number: int) -> None:
        again = number in self.received or bool(self.received and number == signal.SIGINT)
        self.kill = again or not self.saves
        self.received.append(number)
        name = signal.Signals(number).name
        if not self.saves:
            return  # the command says it as it ends
        if self.kill:
            print(f"lisa-dist: {name} again: the ranks are killed", file=sys.stderr)
        elif len(self.received) == 1:
            means = "the run saves a checkpoint after this step and stops; again kills it"
            print(f"lisa-dist: {name}: {means}", file=sys.stderr)

    def _pass_on(self) -> None:
        """Signal the ranks that run; one that has only just started is seen at the next look."""
        running = self._running()
        if self.kill and not running:
            # None has come up, or none is left: those to come find their parent gone.
            if not self.saves:
                print("lisa-dist: interrupted", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED if self.saves else EXIT_INTERRUPTED)
        for process in running - (set() if self.kill else self.asked):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if self.kill else signal.SIGTERM)
            self.asked.add(process)

    def _running(self) -> set[int]:
        started = [file.name.split("_")[1:] for file in self.outcome_dir.glob("started_*")]
        return {int(pid) for rank, pid in started if not (self.outcome_dir / f"outcome_{rank}.json").exists()}
