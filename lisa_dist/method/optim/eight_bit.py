"""AdamW whose moments are held in 8 bits (Dettmers et al., arXiv 2110.02861), by the package torchao.

A shard of at least 4096 elements, divisible by 256, has codes of one byte and an fp32 scale for every 256 of
them; smaller and odd ones stay in fp32. torchao compiles its step once for each shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisa_dist.config import OptimizerConfig, UserError
from lisa_dist.runtime.distributed import local_shard

BLOCK = 256  # elements that share a scale


def check_installed() -> None:
    """Raise :class:`UserError` where torchao is missing."""
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        raise UserError(
            'optimizer=adamw8bit: needs the package torchao; run pip install "lisa-dist[torchao]", or choose adamw'
        ) from error


def build_adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
    """Return torchao's optimizer, an ``Optimizer`` of torch, for groups of parameters with their weight decays."""
    from torchao.optim import AdamW8bit

    betas = (config.betas[0], config.betas[1])
    return AdamW8bit(groups, lr=config.lr, betas=betas, eps=config.eps, block_size=BLOCK)


def zero_moment(optimizer: Any, parameter: torch.Tensor, signed: bool) -> torch.Tensor:
    """Return a moment of zeros for ``parameter``, sharded as it is (private: ``_new_buffer``).

    Args:
        optimizer: from :func:`build_adamw8bit`.
        parameter: what the moment is of.
        signed: the first moment has a sign, the second has none.
    """
    return optimizer._new_buffer(parameter.detach(), signed)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of this rank's shard, of one in 8 bits those of its codes, scales and table."""
    shard = local_shard(tensor)
    if not is_traceable_wrapper_subclass(shard):
        return shard.nbytes
    return sum(getattr(shard, name).nbytes for name in shard.__tensor_flatten__()[0])


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32 where it is held in 8 bits, else the tensor itself.

    Put back by ``copy_`` it is rounded to 8 bits anew, which is not exact: where the largest element of a block is
    negative the table has no entry for it, so the scale shrinks a little.
    """
    shard = local_shard(tensor)
    if not is_traceable_wrapper_subclass(shard):
        return tensor
    full: torch.Tensor = shard.dequantize(torch.float32)  # type: ignore[attr-defined]
    if not isinstance(tensor, DTensor):
        return full
    return DTensor.from_local(
        full, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
