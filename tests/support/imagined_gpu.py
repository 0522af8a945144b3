"""A GPU that is not there: fake tensors on ``cuda``, on any build of torch, whose streams and events do nothing.

Operators check, as on a real one, that what they join lies on one device. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lisa_dist.method.updates import sharded
from lisa_dist.planning.simulation import simulated_world
from lisa_dist.runtime import distributed
from lisa_dist.sharding import streamed, wrapping_policy
from lisa_dist.sharding.link import Link

GPU = torch.device("cuda", 0)


class Stream:
    """What FSDP2 asks of a stream, and of an event: both are always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Stream:
        return Stream()

    def record(self, *args: Any) -> None:
        pass

    wait_event = wait_stream = wait = synchronize = record

    def query(self) -> bool:
        return True


@contextmanager
def imagined_gpu(ranks: int) -> Iterator[FakeTensorMode]:
    """Let this process be rank 0 of so many, each with a GPU; enter the mode where tensors are made."""

    def pinned(tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only host memory can be pinned"
        return tensor

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fully_shard_there(*args: Any, **kwargs: Any) -> Any:
        with mode:  # FSDP2 makes a tensor on the device
            return fully_shard(*args, **kwargs)

    def computed_with_numbers(*args: Any) -> Any:
        with unset_fake_temporarily():  # DTensor finds a shard's place by tensors
            return compute_local_shape_and_global_offset(*args)

    with pytest.MonkeyPatch.context() as patch, simulated_world(ranks):
        patch.setattr(distributed, "device", lambda: GPU)
        patch.setattr(torch.cuda, "current_device", lambda: GPU.index)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Stream)
        patch.setattr(Tensor, "pin_memory", pinned)
        patch.setattr(Tensor, "is_pinned", lambda tensor: False)
        patch.setattr(streamed, "link_to", lambda device: Link())
        patch.setattr(wrapping_policy, "fully_shard", fully_shard_there)
        patch.setattr(sharded, "compute_local_shape_and_global_offset", computed_with_numbers)
        yield mode
