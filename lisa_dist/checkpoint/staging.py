"""Host memory that holds what a checkpoint is written from where training would change it meanwhile.

A copy is made while the next forward and backward passes run, which change no parameter (the idea of DataStates-LLM,
arXiv 2406.10707), by a thread and, on a GPU, a stream of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lisa_dist.checkpoint.shards import Piece
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_bytes

logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes between the starts of two copies: a multiple of every element's size


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
            torch.cuda.current_stream().synchronize()
        return copies


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class SideStream:
    """A GPU's stream for copies that do not wait for training, nor training for them; nothing on a CPU."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream(distributed.device()) if distributed.device().type == "cuda" else None

    def follow(self) -> None:
        """Let what comes on this stream see what this thread's kernels, launched until now, will have written."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Use the stream in this thread while the context lasts."""
        with torch.cuda.stream(self.stream):  # nothing for None
            yield
