"""What ``lisa-dist doctor`` does in ranks: a reduction, two training steps of a tiny model, a checkpoint and back."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import EXIT_DONE, Config, ModelConfig, RunConfig
from lisa_dist.config.loading import to_yaml
from lisa_dist.method.module import TrainModule, begin_period, build_train_module, load_initial_weights
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
STEPS = 2


class SelfTestError(RuntimeError):
    """Something that training needs does not work here."""


def run(config: Config) -> int:
    """Run the whole test in ``run.dir``, which every rank must see. Collective: every rank.

    Raises:
        SelfTestError: a reduction, the file system or a checkpoint gives something else than it should.
    """
    distributed.initialize(config.parallel)
    check_reduction()
    directory = Path(str(config.run.dir))
    check_file_system(directory)
    check_training(config, directory)
    return EXIT_DONE


def check_reduction() -> None:
    """Add up the ranks' numbers on their devices, by NCCL where they are GPUs, by gloo else. Collective: every rank."""
    total = torch.full((1024,), float(distributed.rank()), device=distributed.device())
    dist.all_reduce(total)
    ranks = distributed.world_size()
    if not bool((total == ranks * (ranks - 1) / 2).all()):
        raise SelfTestError(f"an all-reduce over {ranks} ranks gave a wrong sum on {distributed.device()}")


def check_file_system(directory: Path) -> None:
    """Write a file from each rank and read those of all others. Collective: every rank."""
    directory.mkdir(parents=True, exist_ok=True)
    own = directory / f"from_rank_{distributed.rank()}"
    with own.open("w") as file:
        file.write(socket.gethostname())
        file.flush()
        os.fsync(file.fileno())
    distributed.barrier()
    hosts = distributed.gather_objects(socket.gethostname())
    for rank, host in enumerate(hosts):
        other = directory / f"from_rank_{rank}"
        if not other.is_file() or other.read_text() != host:
            raise SelfTestError(
                f"{socket.gethostname()} does not see in {directory} what rank {rank} on {host} wrote: "
                "run.dir must lie on a file system that all machines share"
            )
    distributed.barrier()
    own.unlink()


def check_training(config: Config, directory: Path) -> None:
    """Train a tiny model, save it, read it into another one and compare. Collective: every rank."""
    config = replace(config, model=ModelConfig(architecture=dict(ARCHITECTURE), init="random"))
    train_module = build_train_module(config)
    load_initial_weights(train_module, distributed.device())
    begin_period(train_module, 0)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(distributed.rank()))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(16).expand(2, 16)}
    for step in range(STEPS):
        train_step(train_module, [batch], step, STEPS)
    CheckpointSaver(train_module, directory, to_yaml(config)).save(Progress(step=STEPS))
    again = build_train_module(config)
    restore_checkpoint(again, directory / checkpoint_name(STEPS), distributed.device(), data={})
    if not _equal(train_module, again):
        raise SelfTestError(f"a checkpoint in {directory} does not hold what was written to it")
    distributed.barrier()


def _equal(one: TrainModule, other: TrainModule) -> bool:
    theirs = other.store.tensors()
    return all(
        torch.equal(distributed.local_shard(tensor), distributed.local_shard(theirs[name]))
        for name, tensor in one.store.tensors().items()
    )


if __name__ == "__main__":  # under torchrun, with a directory
    sys.exit(run(Config(run=RunConfig(dir=sys.argv[1]))))
