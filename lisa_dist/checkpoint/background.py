"""The writer of checkpoints: at once, or by a thread from copies in host memory while training goes on.

A copy is made while the next forward and backward passes run, which change no parameter (the idea of DataStates-LLM,
arXiv 2406.10707), by the thread and, on a GPU, a stream of its own.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import torch

from lisa_dist.checkpoint.protocol import Snapshot, write_checkpoint
from lisa_dist.checkpoint.shards import Piece
from lisa_dist.config import CheckpointConfig, StorageError
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_bytes

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes between the starts of two copies: a multiple of every element's size


class CheckpointError(StorageError, RuntimeError):
    """A checkpoint could not be written; earlier ones are as they were."""


class CheckpointWriter:
    """Writes one checkpoint at a time and keeps its outcome until :meth:`finish` asks for it.

    With ``checkpoint.async`` a thread copies what trains to host memory, for which the optimizer waits before its next
    step, then writes; what is frozen it reads where it is. The outcome is the same on every rank by an agreement of
    the threads.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, timeout: float) -> None:
        """Write to ``directory``; a rank waits ``timeout`` seconds for another. Collective: every rank."""
        self.directory = directory
        self.config = config
        self.staging = StagingMemory()
        device = distributed.device()
        # A GPU's stream for copies that do not wait for training, nor training for them; None on a CPU.
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copied = threading.Event()  # what training changes is in host memory
        self.copied.set()
        self.group = distributed.thread_group(timeout)
        self.thread: threading.Thread | None = None
        self.writing: Snapshot | None = None  # what :meth:`finish` was not yet asked for
        self.failure: str | None = None  # of that

    def start(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or begin to; the one before is finished. Collective: every rank."""
        self.writing = snapshot
        if not self.config.in_background:
            self.failure = self._write(snapshot)
            return
        # Cleared here and not in the thread, which may start after the optimizer has asked.
        self.copied.clear()
        if self.side_stream is not None:  # what is copied is what kernels that are launched by now will have written
            self.side_stream.wait_stream(torch.cuda.current_stream())
        self.thread = threading.Thread(
            target=self._write_in_background, args=(snapshot,), name="checkpoint", daemon=True
        )
        self.thread.start()

    def finish(self, stop_on_error: bool | None = None) -> Snapshot | None:
        """Wait for the write in the background and return what is now complete. No communication by this thread.

        It is None where nothing was written since the last call, or that failed. ``stop_on_error`` overrides
        ``checkpoint.on_error``.

        Raises:
            CheckpointError: it failed, on every rank alike.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        snapshot, self.writing = self.writing, None
        failure, self.failure = self.failure, None
        if failure is None:
            return snapshot
        if self.config.on_error == "stop" if stop_on_error is None else stop_on_error:
            raise CheckpointError(f"{failure}; earlier ones are as they were, start again once it can be written")
        logger.warning("%s; the run goes on without it (checkpoint.on_error=warn)", failure)
        return None

    def must_stop(self) -> bool:
        """Whether a write in the background failed and the run is to stop; the next :meth:`finish` says why.

        Ranks may learn of it a step apart.
        """
        ended = self.thread is not None and not self.thread.is_alive()
        if not ended or self.failure is None:
            return False
        if self.config.on_error == "warn":
            self.finish()
            return False
        return True

    def _write(self, snapshot: Snapshot) -> str | None:
        """Write a checkpoint; return why it could not be written. Collective: every rank, in this group."""
        return write_checkpoint(
            snapshot, self.directory, self.config.keep, self.group, prepare=lambda: self._stage(snapshot)
        )

    def _write_in_background(self, snapshot: Snapshot) -> None:
        try:
            with torch.cuda.stream(self.side_stream):  # does nothing for None
                self.failure = self._write(snapshot)
        except Exception as error:  # a rank is gone: the main thread learns it in its own collective
            self.failure = f"the checkpoint of step {snapshot.step} could not be written: {error}"
        finally:
            self.copied.set()  # whatever happened, the optimizer must not wait for ever

    def _stage(self, snapshot: Snapshot) -> None:
        """Copy to host memory what training will change, and let training go on."""
        if not self.config.in_background:
            return
        changing = {
            (folder, name): piece
            for folder, pieces in snapshot.folders.items()
            for name, piece in pieces.items()
            if name not in snapshot.frozen
        }
        for (folder, name), copy in self.staging.copy(changing).items():
            snapshot.folders[folder][name] = copy
        self.copied.set()


class StagingMemory:
    """One block of host memory, pinned where there is a GPU, kept from checkpoint to checkpoint.

    Memory that is fresh costs several times the copy, and what trains needs about as much after a switch as before.
    """

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: dict[tuple[str, str], Piece]) -> dict[tuple[str, str], Piece]:
        """Return the same pieces in this memory, which held others; returns when the copies are there."""
        needed = sum(_aligned(piece.tensor.nbytes) for piece in pieces.values())
        if needed > self.block.numel():
            self.block = torch.empty(0, dtype=torch.uint8)  # given back before more is asked for
            self.block = torch.empty(needed, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            logger.info("checkpoint.async=true: %s of host memory for copies", format_bytes(needed))
        copies, start = {}, 0
        for name, piece in pieces.items():
            tensor = piece.tensor
            target = self.block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor, non_blocking=True)
            copies[name] = Piece(target, piece.offsets)
            start += _aligned(tensor.nbytes)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # a copy to pinned memory is not there when copy_ returns
        return copies


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT  # rounded up
