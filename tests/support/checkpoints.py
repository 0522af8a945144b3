"""Checkpoints that hold a few words in the place of tensors, for tests of the files alone."""

from __future__ import annotations

from pathlib import Path

from lisa_dist.checkpoint.manifest import checkpoint_name, describe_file, write_manifest


def make_checkpoint(directory: Path, step: int, depends_on: list[int] | None = None, words: str = "of step") -> Path:
    """A checkpoint of three files of other content at every step."""
    checkpoint = directory / checkpoint_name(step)
    (checkpoint / "weights").mkdir(parents=True)
    for name in ("state.json", "config.yaml", "weights/rank_00000.safetensors"):
        (checkpoint / name).write_text(f"{name} {words} {step}")
    files = {str(p.relative_to(checkpoint)): describe_file(p) for p in checkpoint.rglob("*") if p.is_file()}
    write_manifest(checkpoint, files, [checkpoint_name(base) for base in depends_on or []])
    return checkpoint
