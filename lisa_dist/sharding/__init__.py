"""Where every byte lives: parameter stores, storage dtypes, offload, activation checkpointing, the ledger of bytes.

Neither samplers nor updates are known here; the private APIs of FSDP2 are called in ``fsdp2.py`` alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lisa_dist.config import ParallelConfig, PrecisionConfig
from lisa_dist.config.placement import stay_whole, stream_frozen
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.sharding.masters import WorldMastersStore
from lisa_dist.sharding.resident import ResidentStore
from lisa_dist.sharding.sharded import ShardedStore
from lisa_dist.sharding.store import ParameterStore
from lisa_dist.sharding.streamed import StreamedStore
from lisa_dist.sharding.waiting_states import HostStates


def build_store(
    module: nn.Module,
    layers: LayerMap,
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    keeps_precision: Callable[[str], bool],
    host_states: HostStates | None = None,
) -> ParameterStore:
    """Put a model on ``meta`` into the store that the configuration asks for. Nothing is allocated.

    ``host_states`` are the inputs of blocks that wait in host memory, where they do.
    """
    ranks = mesh["shard"].size()
    if stream_frozen(parallel, precision, ranks):
        return StreamedStore(module, layers, mesh, precision, keeps_precision, parallel.copied_ahead, host_states)
    if stay_whole(parallel, precision, ranks):
        return ResidentStore(module, layers, mesh, precision, keeps_precision)
    kind = WorldMastersStore if parallel.optimizer_shard == "world" and parallel.replicate > 1 else ShardedStore
    return kind(module, layers, mesh, parallel, precision, keeps_precision)
