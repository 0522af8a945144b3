"""Reading a checkpoint back, at any world size."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from lisa_dist import distributed
from lisa_dist.checkpoint.manifest import damage, list_checkpoints
from lisa_dist.checkpoint.save import MOMENTS, STATE, WEIGHTS, Progress, weight_tensors
from lisa_dist.learner import Learner, allocate

logger = logging.getLogger(__name__)


def newest_complete(directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none. Collective: rank 0 looks, all learn.

    A damaged one is named in the log and passed over.
    """

    def look() -> Path | None:
        for candidate in list_checkpoints(directory):
            wrong = damage(candidate)
            if wrong is None:
                return candidate
            logger.warning("checkpoint %s is passed over: %s", candidate, wrong)
        return None

    return distributed.on_rank_zero(look)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that is not tensors."""
    return json.loads((checkpoint / STATE).read_text())


def restore_checkpoint(learner: Learner, checkpoint: Path, device: torch.device) -> Progress:
    """Allocate the model for the checkpoint's active set and fill it. Collective: every rank.

    The active set comes first: moments exist for it alone, and storage dtypes follow it.
    """
    state = read_state(checkpoint)
    allocate(learner, state["active_layers"], device)
    learner.active.period = state["period"]
    _read_tensors(weight_tensors(learner), checkpoint / WEIGHTS)
    _read_tensors(learner.optimizer.moment_tensors(), checkpoint / MOMENTS)
    learner.optimizer.set_step_counts(state["optimizer_steps"])
    learner.sampler.load_state_dict(state["sampler"])
    return Progress(**state["progress"])


def _read_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    if tensors:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
