"""What a checkpoint holds: the tensors of the model and its optimizer, and all that is not a tensor.

No random state is saved because none is carried along: dropout is keyed by (seed, step, rank), rounding by
(seed, period, parameter, shard), the order of the data by (seed, epoch), the draw of blocks by the sampler's state.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from lisa_dist import __version__
from lisa_dist.checkpoint.manifest import STATE, WEIGHTS, check_format
from lisa_dist.checkpoint.shards import ShardedTensors
from lisa_dist.config import UserError
from lisa_dist.method.module import TrainModule
from lisa_dist.runtime import distributed


@dataclass
class Progress:
    """Where a run stands: the next step follows from it alone."""

    step: int = 0  # optimizer steps done, those left out for what was not finite included
    sequences: int = 0  # seen in these steps, of the data that the run is resumed with
    left_out: list[list[int]] = field(default_factory=list)  # ranges [start, stop) of the data at which losses spiked
    resumed_from: list[int] = field(default_factory=list)
    skipped_steps: int = 0  # steps left out because the loss or a gradient was not finite
    recent_losses: list[float] = field(default_factory=list)  # what a spike is measured by; empty where none is
    best_eval_loss: float | None = None  # the lowest held-out loss after a step, None before the first
    best_step: int | None = None  # the step that it was found after
    evaluations_since_best: int = 0
    evaluated: str | None = None  # which rows that loss is of, None: not known
    evaluated_since: int = -1  # a step: held-out losses until then are of other rows
    order_seed: int = 0  # train.seed at the run's first start, by which the data are ordered and packed
    data: dict[str, Any] = field(default_factory=dict)  # what the data are, see data.prepare.fingerprint

    def forget_best_of_others(self, evaluated: str | None) -> bool:
        """Look for the best held-out loss anew where it was of other rows than will be; return whether it was."""
        others = None not in (self.evaluated, evaluated) and self.evaluated != evaluated
        if others:
            self.best_eval_loss, self.best_step, self.evaluations_since_best = None, None, 0
            self.evaluated_since = self.step
        self.evaluated = evaluated
        return others

    def place_of(self, sequence: int) -> int:
        """Return the place in the stream of data of the ``sequence``-th that the run sees, counted from 0."""
        place, reached = sequence, 0
        for start, stop in sorted(self.left_out):
            start = max(start, reached)  # a range may be within another
            if start <= place:
                place += max(0, stop - start)
            reached = max(reached, stop)
        return place


def state_of(train_module: TrainModule, progress: Progress, moments: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return all that is not a tensor, ready for JSON; ``moments`` are the optimizer's. Collective: every rank."""
    return {
        "progress": asdict(progress),
        "period": train_module.active.period,
        "active_layers": list(train_module.active.blocks),
        "active_modules": list(train_module.active.modules),
        "sampler": train_module.sampler.state_dict(),
        "moments": hash_of_shapes(moments),
        "optimizer_steps": train_module.optimizer.step_counts(),
        "identity": identity(train_module),
        "world_size": distributed.world_size(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            "lisa_dist": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def identity(train_module: TrainModule) -> dict[str, Any]:
    """Return what a run must have in common with a checkpoint to resume from it."""
    config, adapters = train_module.config, train_module.config.update.adapters
    scaling = {} if adapters is None else {"update.alpha": adapters.alpha, "update.rslora": adapters.rslora}
    return {
        "parameters": hash_of_shapes({name: train_module.store.parameter(name) for name in train_module.store.names}),
        "blocks": len(train_module.store.layers.blocks),
        "update.name": config.update.name,
        "sampler.name": config.sampler.name,
        "sampler.period": config.sampler.period,
        "sampler.non_block_modules": config.sampler.draws_non_block_modules,
        "optimizer.name": config.optimizer.name,
        **{f"always_active.{part}": trains for part, trains in asdict(config.always_active).items()},
        **scaling,  # another one makes the same adapters another model
    }


def hash_of_shapes(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of the names and shapes of tensors, whole where they are sharded."""
    shapes = {name: list(tensors[name].shape) for name in sorted(tensors)}
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that is not tensors.

    Raises:
        UserError: the checkpoint is of another format.
    """
    check_format(checkpoint)
    return json.loads((checkpoint / STATE).read_text())


def open_weights(checkpoint: Path) -> ShardedTensors:
    """Open all weights of a checkpoint, those too that an earlier one holds."""
    external = read_state(checkpoint)["external"].items()
    others = {checkpoint.parent / base / WEIGHTS: names for base, names in external}
    return ShardedTensors(checkpoint / WEIGHTS, others)


def check_identity(train_module: TrainModule, checkpoint: Path, written: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to a run like this one.

    Raises:
        UserError: another model or another method wrote it.
    """
    wanted = identity(train_module)
    different = [key for key in wanted if written.get(key, wanted[key]) != wanted[key]]  # some had fewer keys
    settings = ", ".join(f"{key}={written.get(key)}" for key in different if key != "parameters")
    if "parameters" in different and not settings:
        raise UserError(
            f"checkpoint.resume=auto: {checkpoint} holds a model of other parameters than model.name="
            f"{train_module.config.model.name}; resume with the model it was written by or choose another run.dir"
        )
    if different:
        ours = ", ".join(f"{key}={wanted[key]}" for key in different if key != "parameters")
        raise UserError(
            f"checkpoint.resume=auto: {checkpoint} was written with {settings}, this run has {ours}; "
            "resume with the configuration it was written by or choose another run.dir"
        )
