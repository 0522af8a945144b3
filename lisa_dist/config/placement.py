"""Keys of ``parallel.*`` and ``precision.*``: where every byte lives and in which type."""

from __future__ import annotations

from dataclasses import dataclass

from lisa_dist.config.errors import check_auto_or_count, check_choices, check_minimums
from lisa_dist.config.optimization import TrainConfig

MOST_THREADS = 4096  # of a process: more than any machine has cores, fewer than a system refuses


@dataclass
class ParallelConfig:
    nproc_per_node: str = "auto"  # ranks on this machine; auto: the visible GPUs, without GPUs 1
    nodes: int = 1  # machines, for plan and launch
    replicate: int = 1  # replicas of the model (hybrid sharding)
    shard: str = "auto"  # ranks a replica is sharded over, 1: weights stay whole; auto: all ranks / replicate
    reshard_after_forward: bool = True  # free a block's gathered weights between forward and backward
    prefetch: int | None = None  # blocks gathered (null: 1) or copied from the host (null: 4) ahead, in both passes
    offload: str = "none"  # none, frozen (blocks in host memory), auto (of one rank those that must), all (FSDP2's)
    block_major: bool = False  # pass a step's micro-batches together, block by block: each is copied once a step
    offload_activations: bool = False  # with block_major: inputs of blocks wait in host memory until the backward pass
    activation_checkpointing: str = "none"  # none, selective, full, auto (what fits, each block by itself)
    memory_limit: float | None = None  # GiB of its device that a rank may use, for auto; null: all of a GPU
    defer_reduction: bool = False  # reduce gradients once an optimizer step instead of once a micro-batch
    optimizer_shard: str = "replica"  # where masters and moments are sharded: replica, world (over all replicas too)
    timeout: int = 600  # seconds for a collective; longer while loading, saving and in the first step
    cpu_threads: str = "auto"  # threads a rank on CPU; auto: cores / local ranks

    def __post_init__(self) -> None:
        check_auto_or_count("parallel.nproc_per_node", self.nproc_per_node)
        check_auto_or_count("parallel.shard", self.shard)
        check_auto_or_count("parallel.cpu_threads", self.cpu_threads, at_most=MOST_THREADS)
        check_minimums("parallel", self, nodes=1, replicate=1, prefetch=0, timeout=1, memory_limit=0)
        check_choices("parallel", self, optimizer_shard=["replica", "world"], offload=["none", "frozen", "auto", "all"])
        check_choices("parallel", self, activation_checkpointing=["none", "full", "selective", "auto"])

    @property
    def gathered_ahead(self) -> int:
        """Blocks that are gathered ahead of the one in use."""
        return 1 if self.prefetch is None else self.prefetch

    @property
    def copied_ahead(self) -> int:
        """Blocks that are copied from host memory ahead of the one in use.

        Several, so that copies go on while head and optimizer compute, which takes as long as some blocks' copies.
        """
        return 4 if self.prefetch is None else self.prefetch

    def ranks_of_replica(self, num_ranks: int) -> int:
        """Return over how many ranks a replica is sharded, of so many in all."""
        return num_ranks // self.replicate if self.shard == "auto" else int(self.shard)


@dataclass
class PrecisionConfig:
    frozen: str = "bfloat16"  # storage of frozen blocks
    active: str = "float32"  # storage of active blocks (the masters); bfloat16 loses steps below 1/512 of a weight
    compute: str = "bfloat16"  # arithmetic of forward and backward
    reduce: str = "float32"  # gradient reduction
    on_freeze: str = "stochastic"  # rounding of masters when a block is frozen: stochastic, nearest

    def __post_init__(self) -> None:
        types = {key: ["float32", "bfloat16"] for key in ("frozen", "active", "compute", "reduce")}
        check_choices("precision", self, **types, on_freeze=["stochastic", "nearest"])


def is_block_major(parallel: ParallelConfig, train: TrainConfig) -> bool:
    """Return whether the micro-batches of a step, of which there are several, pass one block at a time together."""
    return parallel.block_major and train.global_batch_size > train.micro_batch_size


def micro_batches_together(parallel: ParallelConfig, train: TrainConfig) -> int:
    """Return how many micro-batches lie in memory at a time, on the one rank that may hold several."""
    return -(-train.global_batch_size // train.micro_batch_size) if is_block_major(parallel, train) else 1


def inputs_wait_in_host_memory(parallel: ParallelConfig, train: TrainConfig) -> bool:
    """Return whether the inputs of blocks wait in host memory from the forward to the backward pass."""
    return parallel.offload_activations and is_block_major(parallel, train)


def stay_whole(parallel: ParallelConfig, precision: PrecisionConfig, ranks_of_replica: int) -> bool:
    """Return whether weights lie whole on their rank, and are used where they lie.

    Not so where they must be brought from elsewhere to be used: from other ranks, from host memory, or from a dtype of
    which the copy in another one would cost more than itself. Nor where replicas share out the masters.
    """
    return (
        ranks_of_replica == 1
        and parallel.offload == "none"
        and precision.frozen == precision.compute
        and (parallel.replicate == 1 or parallel.optimizer_shard == "replica")
    )


def stream_frozen(parallel: ParallelConfig, precision: PrecisionConfig, ranks_of_replica: int) -> bool:
    """Return whether one rank copies its frozen blocks from host memory as they are used, and gathers nothing."""
    return (
        ranks_of_replica == 1
        and parallel.offload in ("frozen", "auto")
        and precision.frozen == precision.compute
        and parallel.replicate == 1
    )
