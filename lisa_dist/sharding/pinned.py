"""Host memory that CUDA's driver knows, so that copies of it run beside what the GPU computes.

torch's own allocator of such memory rounds up to a power of two (a block of 1.6 GiB to 2), and touches the pages of a
buffer by one thread. Copies ask the driver, not that allocator, what they are given.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import defaultdict

import torch
from torch import Tensor

from lisa_dist.config import UserError
from lisa_dist.runtime.units import format_bytes


class PinnedMemory:
    """Bytes of host memory that are registered with the driver until nothing refers to this any more.

    Raises:
        UserError: the driver or the system refuses as much.
    """

    def __init__(self, size: int) -> None:
        try:
            self.bytes = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _refused(size, str(error)) from error
        with contextlib.suppress(OSError):  # a system without large pages
            self.bytes.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self.bytes, dtype=torch.uint8)
        whole.zero_()  # by all threads: what is there already is registered sooner
        runtime, address = torch.cuda.cudart(), whole.data_ptr()
        status = runtime.cudaHostRegister(address, size, 0)
        if int(status) != 0:
            raise _refused(size, runtime.cudaGetErrorString(status))
        # Not at the end of the process, which gives everything back.
        weakref.finalize(self, runtime.cudaHostUnregister, address).atexit = False


class PinnedPool:
    """Gives out pinned buffers, and takes back those that nothing refers to any more, for others of the same size."""

    def __init__(self) -> None:
        self._free: dict[int, list[PinnedMemory]] = defaultdict(list)

    def take(self, size: int) -> Tensor:
        """Return ``size`` bytes, whose values say nothing.

        Raises:
            UserError: the driver or the system refuses as much.
        """
        free = self._free[size]
        memory = free.pop() if free else PinnedMemory(size)
        buffer = torch.frombuffer(memory.bytes, dtype=torch.uint8)
        # The storage lives as long as any view of it, as that of a checkpoint which is being written.
        weakref.finalize(buffer.untyped_storage(), free.append, memory).atexit = False
        return buffer


def _refused(size: int, why: str) -> UserError:
    return UserError(
        f"parallel.offload=frozen: no {format_bytes(size)} more of pinned host memory for a block ({why}); raise the "
        "limit (ulimit -l, the container's memory), or take parallel.offload=none or more ranks"
    )
