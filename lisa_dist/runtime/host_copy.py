"""Numbers that a device is still to compute, on their way to the host."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of a tensor in host memory, of which the device has been told but for which nobody waits yet."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Have the copy made once the device has done what it was given so far.

        Args:
            tensor: of one axis; what it holds now is what is copied.
        """
        self._numbers: list[float] | None = None
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor.detach()
        if tensor.is_cuda:
            # Pageable memory would make the host wait, and so would a copy that is asked for only when it is read,
            # until all that was given to the device in between is done.
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """Return the numbers; the host waits until they are there."""
        if self._numbers is None:
            if self._event is not None:
                self._event.synchronize()
            self._numbers = self._tensor.tolist()
        return self._numbers
