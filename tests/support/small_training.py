"""A small model, its data and a training of a few periods, which many tests share."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

from lisa_dist.config import Config
from lisa_dist.method.module import TrainModule, begin_period, build_train_module, load_initial_weights
from lisa_dist.method.optim.schedule import learning_rate
from lisa_dist.method.updates.sharded import whole
from lisa_dist.runtime import distributed
from lisa_dist.sharding import fsdp2
from lisa_dist.sharding.sharded import ShardedStore
from lisa_dist.training.step import train_step
from tests.support.plain_lisa import train_plainly
from tests.support.plain_methods import plain_model

# No size is divisible by two ranks, let alone by four.
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 127,
    "hidden_size": 54,
    "intermediate_size": 101,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


STEPS, PERIOD, GLOBAL_BATCH = 6, 2, 4


# Of weights that moved by some 5%. Sums in another order, as libraries choose by the place in memory, differ by 1e-7,
# and Adam divides small gradients by themselves: 1e-5 was exceeded now and then.
ROUNDED = 5e-5


def make_config(**changes: Any) -> Config:
    """A configuration in fp32 throughout; ``changes`` are group -> fields."""
    config = Config()
    config.model.architecture = dict(ARCHITECTURE)
    config.model.init = "random"
    config.sampler.period = PERIOD
    config.precision = dataclasses.replace(config.precision, frozen="float32", compute="float32")
    config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.grad_clip = 1e-3, 0.1, 0.5
    config.scheduler.warmup_steps = 2
    for group, fields in changes.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, group), name)
            setattr(getattr(config, group), name, value)
    return config


def make_global_batches(steps: int = STEPS, size: int = GLOBAL_BATCH) -> list[list[dict[str, torch.Tensor]]]:
    """Micro-batches of one sequence of unequal lengths, some tokens without loss; as many for each step."""
    generator = torch.Generator().manual_seed(11)
    lengths = random.Random(5)
    batches = []
    for _ in range(steps):
        step = []
        for _ in range(size):
            length = lengths.randint(3, 17)
            ids = torch.randint(0, 127, (1, length), generator=generator)
            labels = ids.clone()
            labels[:, : lengths.randint(0, length - 2)] = -100
            step.append({"input_ids": ids, "position_ids": torch.arange(length)[None], "labels": labels})
        batches.append(step)
    return batches


def build_and_load(config: Config, device: torch.device | str = "cpu") -> TrainModule:
    """The model with everything that changes it, filled with the weights to start from. Collective: every rank."""
    train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device(device))
    return train_module


def full_parameters(train_module: TrainModule) -> dict[str, torch.Tensor]:
    """All parameters, whole, in fp32. Collective."""
    fsdp2.reshard_all(train_module.store.module)
    store = train_module.store
    return {name: whole(store.master(name).detach()).float().clone() for name in store.names}


def reduction_dtypes(train_module: TrainModule) -> set[torch.dtype]:
    """The dtypes in which gradients are summed."""
    store = train_module.store
    if not isinstance(store, ShardedStore):  # where the gradients of micro-batches are added
        return {store.master(name).dtype for name in train_module.optimizer.parameters}
    groups = {id(group): group for _, group in store.handles.values()}
    return {dtype for group in groups.values() if (dtype := fsdp2.reduce_dtype(group)) is not None}


def changed_by_step(
    train_module: TrainModule, micro_batches: list[dict[str, torch.Tensor]], step: int, steps: int
) -> set[str]:
    """Make a step; the names of the parameters of which this rank's part is another one afterwards. Collective."""

    def parts() -> dict[str, torch.Tensor]:
        fsdp2.reshard_all(train_module.store.module)
        names = train_module.store.names
        return {name: distributed.local_shard(train_module.store.master(name).detach()).clone() for name in names}

    before = parts()
    train_step(train_module, micro_batches, step, steps)
    return {name for name, part in parts().items() if not torch.equal(part, before[name])}


def to_be_trained(train_module: TrainModule) -> set[str]:
    """The names of the parameters that the last draw, the update and ``always_active`` let train."""
    inside = [train_module.store.block_parameters(block) for block in train_module.active.blocks]
    always = train_module.config.always_active
    wanted = {"embeddings": always.embeddings, "norm": always.norm, "head": always.head}
    outside = [train_module.store.parameters_of(part) for part, trains in wanted.items() if trains]
    return {name for names in inside for name in train_module.update.trainable_parameters(names)} | {
        name for names in outside for name in names
    }


def train_on_rank(config: Config, steps: int = STEPS, size: int = GLOBAL_BATCH) -> dict[str, Any]:
    """Build, train, and return what the tests compare. Runs on every rank."""
    train_module = build_and_load(config)
    initial = full_parameters(train_module)
    losses, grad_norms, draws, reduce_dtypes, bytes_counted = [], [], [], [], []
    for step, micro_batches in enumerate(make_global_batches(steps, size)):
        if step % config.sampler.period == 0:
            begin_period(train_module, step // config.sampler.period)
            draws.append(list(train_module.active.blocks))
            reduce_dtypes.append(reduction_dtypes(train_module))
        mine = micro_batches[distributed.rank() :: distributed.world_size()]
        result = train_step(train_module, mine, step, steps)
        losses.append(result.loss)
        grad_norms.append(result.grad_norm)
        bytes_counted.append(train_module.optimizer.state_bytes())
    return {
        "initial": initial,
        "final": full_parameters(train_module),
        "losses": losses,
        "grad_norms": grad_norms,
        "draws": draws,
        "reduce_dtypes": reduce_dtypes,
        "optimizer_bytes": bytes_counted,
    }


def train_reference(
    config: Config, initial: dict[str, torch.Tensor], draws: list[list[int]]
) -> tuple[Any, list[float]]:
    model: Any = plain_model(config)
    model.load_state_dict(initial, strict=False)
    ends = [p for name, p in model.named_parameters() if ".layers." not in name]
    rates = [learning_rate(config.scheduler, config.optimizer.lr, step, STEPS) for step in range(STEPS)]
    losses = train_plainly(
        model,
        list(model.model.layers),
        ends,
        make_global_batches(),
        draws,
        PERIOD,
        rates,
        config.optimizer.weight_decay,
        config.optimizer.grad_clip,
    )
    return dict(model.named_parameters()), losses
