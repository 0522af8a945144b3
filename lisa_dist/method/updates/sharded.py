"""Small sharded tensors beside the model's parameters: adapters' initial values, projected gradients, projectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lisa_dist.runtime.distributed import as_sharded, local_shard
from lisa_dist.runtime.seeds import keyed_seed


def sharded_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return fp32 zeros of ``shape``, sharded over rows on the mesh of ``like``, on its device (``meta`` too)."""
    if not isinstance(like, DTensor):
        return like.detach().new_zeros(shape, dtype=torch.float32)
    local_shape, _ = compute_local_shape_and_global_offset(shape, like.device_mesh, like.placements)
    zeros = local_shard(like.detach()).new_zeros(local_shape, dtype=torch.float32)
    return as_sharded(zeros, like, shape)


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor, on the mesh's device even where shards lie in host memory.

    Collective: every rank of its mesh.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    mesh, shape, stride = tensor.device_mesh, tensor.shape, tensor.stride()
    on_mesh = DTensor.from_local(  # which takes the shard there
        local_shard(tensor), mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )
    return on_mesh.full_tensor()


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator on the CPU that depends on the seed and a parameter's name alone."""
    return torch.Generator().manual_seed(keyed_seed(seed, name))
