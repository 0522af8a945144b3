"""What an optimizer is to the rest of the program, and what is asked of a tensor of its state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisa_dist.runtime.distributed import as_sharded, local_shard


@dataclass(frozen=True)
class Moment:
    """A mean over gradients that an optimizer keeps of a parameter, of the parameter's shape."""

    name: str  # its key in the optimizer's state, and in checkpoints
    squared: bool = False  # of squared gradients: without a sign, and carried into another basis by squares


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimizer is built and what it keeps: all that the program knows of it.

    Attributes:
        moments: those of its state that a checkpoint and host memory hold, and that follow a change of basis.
        build: from groups, each with ``params`` (none yet), ``weight_decay`` and keys that are not the optimizer's,
            to an optimizer of torch. A step must touch nothing but the parameters with a gradient of the groups as
            they are then, and their state. It may write the ``compute_copy`` that a parameter has with it: those for
            which it did are the optimizer's attribute ``copied``, and are not written again.
        zero_state: from such an optimizer and what it steps, to the state that it would itself make at a first step,
            sharded alike. ``step`` is among it where the optimizer counts its steps.
        state_bytes: from the shard that is stepped, to the bytes of its moments on this rank.
        scales_gradients: whether a step itself divides gradients by the optimizer's attribute ``grad_scale``, and
            changes nothing where ``found_inf`` is 1, both scalars on the device, as torch's fused optimizers do.
    """

    moments: tuple[Moment, ...]
    build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    zero_state: Callable[[torch.optim.Optimizer, Tensor], dict[str, Tensor]]
    state_bytes: Callable[[Tensor], int]
    scales_gradients: bool = False


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of this rank's shard, of a packed one those of its codes, scales and table."""
    shard = local_shard(tensor)
    if not is_traceable_wrapper_subclass(shard):
        return shard.nbytes
    return sum(getattr(shard, name).nbytes for name in shard.__tensor_flatten__()[0])


def in_full(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 where it is packed, as moments in 8 bits are, else the tensor itself.

    Put back by ``copy_`` it is rounded to 8 bits anew, which is not exact: where the largest element of a block is
    negative the table has no entry for it, so the scale shrinks a little.
    """
    shard = local_shard(tensor)
    if not is_traceable_wrapper_subclass(shard):
        return tensor
    full: Tensor = shard.dequantize(torch.float32)  # type: ignore[attr-defined]
    return as_sharded(full, tensor, tuple(tensor.shape))
