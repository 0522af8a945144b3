"""Reading a checkpoint back, at any world size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from lisa_dist import distributed
from lisa_dist.checkpoint.manifest import MOMENTS, WEIGHTS, damage, list_checkpoints
from lisa_dist.checkpoint.state import Progress, check_identity, read_state, weight_tensors
from lisa_dist.config import UserError
from lisa_dist.learner import Learner, adopt_trained, allocate

logger = logging.getLogger(__name__)


def newest_complete(directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none at all. Collective: every rank reads a share.

    A damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints, but all are damaged: starting from scratch is the user's decision.
    """
    found = distributed.on_rank_zero(lambda: list_checkpoints(directory))
    reasons = []
    for candidate in found:
        shares = distributed.gather_objects(damage(candidate, distributed.rank(), distributed.world_size()))
        wrong = next((share for share in shares if share is not None), None)
        if wrong is None:
            return candidate
        reasons.append(wrong)
        if distributed.is_main():
            logger.warning("checkpoint %s is passed over: %s", candidate, wrong)
    if reasons:
        raise UserError(
            f"checkpoint.resume=auto: every checkpoint in {directory} is damaged ({'; '.join(reasons)}); "
            "mend one, or start again in another run.dir"
        )
    return None


def restore_checkpoint(learner: Learner, checkpoint: Path, device: torch.device) -> tuple[Progress, dict[str, Any]]:
    """Allocate the model for the checkpoint's active set and fill it. Collective: every rank.

    The active set comes first: moments exist for it alone, and storage dtypes follow it.

    Returns:
        Where the run stands, and the whole state of the checkpoint.

    Raises:
        UserError: the checkpoint is that of another model or method.
    """
    state = distributed.on_rank_zero(lambda: read_state(checkpoint))
    check_identity(learner, checkpoint, state["identity"])
    allocate(learner, state["active_layers"], device)
    learner.active.period = state["period"]
    restore_weights(learner, checkpoint, state)
    adopt_trained(learner)
    waiting = state["optimizer_steps"].keys() - learner.optimizer.parameters.keys()
    learner.optimizer.expect_offloaded({name: learner.sharded.parameter(name) for name in sorted(waiting)})
    moments = learner.optimizer.moment_tensors()
    _read_tensors(moments, checkpoint / MOMENTS)
    learner.optimizer.load_moments(moments)
    learner.optimizer.set_step_counts(state["optimizer_steps"])
    learner.sampler.load_state_dict(state["sampler"])
    return Progress(**state["progress"]), state


def restore_weights(learner: Learner, checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill an allocated model with the weights of a checkpoint, in the dtypes it has. Collective: every rank.

    Args:
        learner: whose model is filled; its optimizer is left alone.
        checkpoint: where to read.
        state: of the checkpoint; names the earlier ones that hold the rest of its weights.
    """
    weights = weight_tensors(learner)
    for holder, names in state["elsewhere"].items():
        _read_tensors({name: weights.pop(name) for name in names}, checkpoint.parent / holder / WEIGHTS)
    _read_tensors(weights, checkpoint / WEIGHTS)


def _read_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    if tensors:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
