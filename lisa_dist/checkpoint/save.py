"""Writing a checkpoint: weights and moments as sharded safetensors, everything else as JSON."""

from __future__ import annotations

import json
import logging
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from lisa_dist import __version__, distributed
from lisa_dist.checkpoint.manifest import checkpoint_name, remove_old, write_manifest
from lisa_dist.learner import Learner
from lisa_dist.sharding.storage import reshard_all
from lisa_dist.telemetry.records import write_atomically

logger = logging.getLogger(__name__)

WEIGHTS, MOMENTS, STATE = "weights", "optimizer", "state.json"


@dataclass
class Progress:
    """Where a run stands: the next step follows from it alone."""

    step: int = 0  # optimizer steps done; also the data position
    best_eval_loss: float | None = None
    resumed_from: list[int] = field(default_factory=list)
    skipped_steps: int = 0


def weight_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """Return every parameter and persistent buffer, tied ones once, by name: the live shards, no copies."""
    reshard_all(learner.sharded.module)
    tensors = learner.sharded.module.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensors[name].detach() for name in tensors if first_names[id(tensors[name])] == name}


def save_checkpoint(learner: Learner, progress: Progress, directory: Path, keep: int) -> Path:
    """Write the checkpoint of ``progress.step`` under ``directory``. Collective: every rank.

    It is written under another name and renamed when its manifest is there, so that a directory of the name
    ``step_...`` is complete. No file of it is a pickle.
    """
    final = directory / checkpoint_name(progress.step)
    partial = directory / f".{final.name}.partial"
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        (partial / WEIGHTS).mkdir(parents=True)
        (partial / MOMENTS).mkdir()
    distributed.barrier()
    state = state_of(learner, progress)
    _write_tensors(weight_tensors(learner), partial / WEIGHTS)
    _write_tensors(learner.optimizer.moment_tensors(), partial / MOMENTS)
    distributed.barrier()
    if distributed.is_main():
        write_atomically(partial / STATE, json.dumps(state, indent=1))
        write_manifest(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        remove_old(directory, keep)
    distributed.barrier()
    return final


def state_of(learner: Learner, progress: Progress) -> dict[str, Any]:
    """Return all that is not a tensor, ready for JSON. Collective: every rank."""
    return {
        "progress": vars(progress),
        "period": learner.active.period,
        "active_layers": learner.active.blocks,
        "sampler": learner.sampler.state_dict(),
        "optimizer_steps": learner.optimizer.step_counts(),
        "world_size": distributed.world_size(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {
            "lisa_dist": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _write_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    if tensors:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
