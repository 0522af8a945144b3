"""Reading single whole tensors out of a checkpoint's shards, without a process group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from lisa_dist.checkpoint.manifest import WEIGHTS
from lisa_dist.checkpoint.state import read_state


@dataclass(frozen=True)
class StoredPiece:
    """The part of a tensor that one file holds: from ``offsets`` on, of shape ``shape``."""

    file: Path
    offsets: list[int]
    shape: list[int]


class ShardedTensors:
    """The tensors of a directory of safetensors files, one a rank, in DCP's layout, memory-mapped."""

    def __init__(self, directory: Path, external: dict[Path, list[str]] | None = None) -> None:
        """Open every file.

        Args:
            directory: of the files.
            external: further directories, with the names of the tensors that are taken from each.
        """
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self.pieces: dict[str, list[StoredPiece]] = {}
        self._open(directory, None)
        for other, names in (external or {}).items():
            self._open(other, set(names))

    @classmethod
    def of_weights(cls, checkpoint: Path) -> ShardedTensors:
        """Open all weights of a checkpoint, those too that an earlier one holds."""
        external = read_state(checkpoint)["external"].items()
        return cls(checkpoint / WEIGHTS, {checkpoint.parent / base / WEIGHTS: names for base, names in external})

    def _open(self, directory: Path, wanted: set[str] | None) -> None:
        for file in sorted(directory.glob("*.safetensors")):
            opened = self._files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            offsets = json.loads((opened.metadata() or {}).get(CUSTOM_METADATA_KEY, "{}"))
            for name in opened.keys():  # noqa: SIM118  a safetensors file is no mapping
                if wanted is None or name in wanted:
                    shape = opened.get_slice(name).get_shape()
                    # A file without offsets holds whole tensors.
                    start = offsets.get(name, {}).get(SAVED_OFFSETS_KEY, [0] * len(shape))
                    self.pieces.setdefault(name, []).append(StoredPiece(file, start, shape))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.pieces))

    def shape(self, name: str) -> list[int]:
        """Return the shape of the whole tensor of that name."""
        pieces = self.pieces[name]
        return [max(p.offsets[axis] + p.shape[axis] for p in pieces) for axis in range(len(pieces[0].shape))]

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor of that name, in the dtype it was stored in."""
        pieces = self.pieces[name]
        if len(pieces) == 1:  # whole in one file: no second copy
            return self._files[pieces[0].file].get_tensor(name)
        whole: torch.Tensor | None = None
        for piece in pieces:
            part = self._files[piece.file].get_tensor(name)
            whole = torch.empty(self.shape(name), dtype=part.dtype) if whole is None else whole
            whole[tuple(slice(start, start + length) for start, length in zip(piece.offsets, piece.shape))] = part
        assert whole is not None
        return whole

    def __enter__(self) -> ShardedTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
