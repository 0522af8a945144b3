"""Reading a checkpoint back, at any world size."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from lisa_dist.checkpoint.differences import changed_data, refuse_other_data, refuse_other_moments
from lisa_dist.checkpoint.manifest import MOMENTS, WEIGHTS, check_format, list_checkpoints, verify
from lisa_dist.checkpoint.state import Progress, check_identity, hash_of_shapes, read_state
from lisa_dist.config import Config, UserError
from lisa_dist.method.module import TrainModule, add_trained_params, allocate
from lisa_dist.runtime import distributed
from lisa_dist.runtime.redaction import public_yaml

logger = logging.getLogger(__name__)


def newest_complete(directory: Path) -> Path | None:
    """Return the newest undamaged checkpoint, None if there is none at all. Collective: every rank reads a share.

    A damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints, but all are damaged: starting from scratch is the user's decision. Or one is
            of another format, which says nothing of the earlier ones.
    """
    found = distributed.on_rank_zero(lambda: list_checkpoints(directory))
    reasons = []
    for candidate in found:
        distributed.on_rank_zero(partial(check_format, candidate))
        shares = distributed.gather_objects(verify(candidate, distributed.rank(), distributed.world_size()))
        wrong = next((share for share in shares if share is not None), None)
        if wrong is None:
            return candidate
        reasons.append(wrong)
        if distributed.is_main():
            logger.warning("checkpoint %s is passed over: %s", candidate, wrong)
    if reasons:
        raise UserError(
            f"checkpoint.resume=auto: every checkpoint in {directory} is damaged ({'; '.join(reasons)}); "
            "fix one, or start again in another run.dir"
        )
    return None


def restore_checkpoint(
    train_module: TrainModule, checkpoint: Path, device: torch.device, data: Mapping[str, Any]
) -> tuple[Progress, dict[str, Any]]:
    """Allocate the model for the checkpoint's active set and fill it. Collective: every rank.

    The active set comes first: optimizer state exists for it alone, and storage dtypes follow it.

    Args:
        train_module: fresh, or one whose training goes back; then nothing of what it holds is left.
        checkpoint: its directory.
        device: where shards are kept.
        data: the fingerprint of the data that the run is resumed with.

    Returns:
        Where the run stands, and the whole state of the checkpoint.

    Raises:
        UserError: the checkpoint is that of another model or method, or of other data.
    """
    state = distributed.on_rank_zero(lambda: read_state(checkpoint))
    check_identity(train_module, checkpoint, state["identity"])
    progress = place_in_data(Progress(**state["progress"]), checkpoint, data, train_module.config)
    train_module.optimizer.remove_all()
    allocate(train_module, state["active_layers"], device, state["active_modules"])
    train_module.active.period = state["period"]
    restore_weights(train_module, checkpoint, state)
    add_trained_params(train_module)
    # State that waits in host memory for a frozen block (optimizer.state_on_freeze=offload) is in the checkpoint too.
    waiting = state["optimizer_steps"].keys() - train_module.optimizer.parameters.keys()
    train_module.optimizer.allocate_offloaded({name: train_module.store.like_master(name) for name in sorted(waiting)})
    moments = train_module.optimizer.moment_tensors()
    if hash_of_shapes(moments) != state["moments"]:
        refuse_other_moments(checkpoint, public_yaml(train_module.config))
    _read_tensors(moments, checkpoint / MOMENTS)
    train_module.optimizer.load_moments(moments)
    train_module.optimizer.set_step_counts(state["optimizer_steps"])
    if train_module.config.optimizer.state_on_freeze == "discard":
        train_module.optimizer.offloaded.clear()  # of a start that kept it
    train_module.sampler.load_state_dict(state["sampler"])
    return progress, state


def place_in_data(progress: Progress, checkpoint: Path, data: Mapping[str, Any], config: Config) -> Progress:
    """Return ``progress`` with the place in ``data``: that of the checkpoint, or the start of other data.

    Raises:
        UserError: the data are other ones, and ``checkpoint.new_data=false``.
    """
    if not changed_data(progress.data, data):
        return progress
    if not config.checkpoint.new_data:
        refuse_other_data(checkpoint, progress.data, data, public_yaml(config))
    if distributed.is_main():
        logger.warning(
            "checkpoint.new_data=true: other data than those of %s (%s), so the run goes on at their start",
            checkpoint.name,
            ", ".join(changed_data(progress.data, data)),
        )
    return replace(progress, sequences=0, left_out=[], recent_losses=[], data=dict(data))


def restore_weights(train_module: TrainModule, checkpoint: Path, state: dict[str, Any]) -> None:
    """Fill an allocated model, not its optimizer, with the weights of a checkpoint. Collective: every rank.

    ``state`` is the checkpoint's; it names the earlier ones that hold the rest of its weights.
    """
    weights = train_module.store.tensors()
    for base, names in state["external"].items():
        _read_tensors({name: weights.pop(name) for name in names}, checkpoint.parent / base / WEIGHTS)
    _read_tensors(weights, checkpoint / WEIGHTS)


def _read_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    if tensors:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
