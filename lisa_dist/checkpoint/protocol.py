"""How a checkpoint becomes a directory: every rank's files under another name, the manifest last, then one rename.

So a directory of the name ``step_...`` is complete, whenever the program ends. No file is a pickle.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from lisa_dist.checkpoint.changes import CheckpointPlan
from lisa_dist.checkpoint.manifest import (
    MOMENTS,
    WEIGHTS,
    describe_file,
    list_checkpoints,
    read_dependencies,
    replaced_base,
    step_of,
    write_manifest,
)
from lisa_dist.checkpoint.shards import Piece, WrittenFile, write_pieces
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import flush_directory, write_atomically

logger = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """What one checkpoint will hold of this rank."""

    step: int
    plan: CheckpointPlan
    folders: dict[str, dict[str, Piece]]  # weights and moments
    frozen: set[str]  # of these, what nothing changes in place while the checkpoint is written
    texts: dict[str, str]  # further files by name, written by rank 0
    best: str | None = None  # the name of a checkpoint that is kept besides the newest, maybe this one


def write_checkpoint(
    snapshot: Snapshot,
    directory: Path,
    keep: int,
    group: dist.ProcessGroup | None,
    prepare: Callable[[], object] = lambda: None,
) -> str | None:
    """Write a checkpoint, then remove old ones. Collective: every rank, in ``group``.

    Args:
        snapshot: what this rank writes.
        directory: the folder of all checkpoints.
        keep: how many of them stay, as in :func:`remove_old`.
        group: what the ranks agree through.
        prepare: done first, on every rank.

    Returns:
        Why it could not be written, the same on every rank, or None. Then earlier checkpoints are as they were.
    """
    unfinished = directory / f".{snapshot.plan.name}.partial"
    agree = partial(_agree, snapshot.step, group)
    files: dict[str, WrittenFile] = {}

    def begin() -> None:
        prepare()
        if distributed.is_main():
            _make_folders(unfinished)

    # Each step waits for all ranks: no rank writes before the folders are there, and the manifest comes last.
    failure = agree(begin)
    if failure is None:
        failure = agree(lambda: files.update(_write_own_files(snapshot, unfinished)))
    if failure is None:
        gathered = distributed.gather_objects(files, group)
        everything = {name: file for of_rank in gathered for name, file in of_rank.items()}
        failure = agree(lambda: _complete(snapshot.plan, unfinished, everything, keep, snapshot.best))
    if failure is not None and distributed.is_main():
        shutil.rmtree(unfinished, ignore_errors=True)
    return failure


def remove_leftovers(directory: Path) -> None:
    """Remove what writes that never ended left behind; where a replacement was cut short, the old one returns."""
    for replaced in directory.glob(".step_*.replaced"):
        final = directory / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not final.exists():
            replaced.replace(final)
    for leftover in [*directory.glob(".step_*.partial"), *directory.glob(".step_*.replaced")]:
        shutil.rmtree(leftover, ignore_errors=True)


def remove_old(directory: Path, newest: Path, keep: int, best: str | None = None) -> None:
    """Remove all but the ``keep`` newest checkpoints (0: keep all) up to ``newest``, the one that is called ``best``,
    and those that they depend on.

    Later ones, of a run that was set back to an earlier step, are left alone: they may be damaged, and must not
    push out a good one. Earlier ones whose base was replaced since can't be read any more and are not counted.
    """
    if keep > 0:
        found = [path for path in list_checkpoints(directory) if (step_of(path) or 0) <= (step_of(newest) or 0)]
        readable = [path for path in found if replaced_base(path) is None]
        kept = readable[:keep] + [path for path in readable[keep:] if path.name == best]
        needed = {name for path in kept for name in read_dependencies(path)}
        for old in [path for path in found if path not in kept]:
            if old.name not in needed:
                shutil.rmtree(old, ignore_errors=True)


def _make_folders(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    for folder in (WEIGHTS, MOMENTS):
        (unfinished / folder).mkdir(parents=True)


def _write_own_files(snapshot: Snapshot, unfinished: Path) -> dict[str, WrittenFile]:
    written = {}
    for folder, pieces in snapshot.folders.items():
        name = f"{folder}/rank_{distributed.rank():05d}.safetensors"
        written[name] = write_pieces(pieces, unfinished / name)
    if distributed.is_main():
        for name, text in snapshot.texts.items():
            write_atomically(unfinished / name, text)
            written[name] = describe_file(unfinished / name)
    return written


def _complete(
    plan: CheckpointPlan, unfinished: Path, files: dict[str, WrittenFile], keep: int, best: str | None
) -> None:
    if not distributed.is_main():
        return
    directory, final = unfinished.parent, unfinished.with_name(plan.name)
    write_manifest(unfinished, files, plan.depends_on)
    # A file that was flushed can still be lost with its name, which is the directory's to keep.
    for folder in (unfinished / WEIGHTS, unfinished / MOMENTS, unfinished):
        flush_directory(folder)
    replaced = directory / f".{final.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # a directory can't be renamed over one that holds files
        final.replace(replaced)
    unfinished.replace(final)
    flush_directory(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    remove_old(directory, final, keep, best)


def _agree(step: int, group: dist.ProcessGroup | None, action: Callable[[], object]) -> str | None:
    """Do something with files on every rank; return the first failure of any rank. Collective: every rank."""

    def attempt() -> str | None:
        try:
            action()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            return f"rank {distributed.rank()}: {error.strerror or error}{where}"
        except Exception as error:  # the other ranks wait for this one's word
            logger.exception("writing the checkpoint of step %d", step)
            return f"rank {distributed.rank()}: {type(error).__name__}: {error}"
        return None

    failures = [text for text in distributed.gather_outcomes(attempt, group) if text is not None]
    return f"the checkpoint of step {step} could not be written: {failures[0]}" if failures else None
