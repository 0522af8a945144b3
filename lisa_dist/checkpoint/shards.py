"""A rank's part of sharded tensors as one safetensors file, in the layout that torch.distributed.checkpoint reads.

The file is written here and not by DCP's own HuggingFaceStorageWriter, whose planning needs collectives, so
that a thread can write while training goes on, one tensor is in host memory at a time, and the checksum costs no
second reading. ``HuggingFaceStorageReader`` reads it at any world size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor, Replicate

from lisa_dist.models.weight_files import DTYPES
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import replacing_file

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """The part of a tensor that this rank writes."""

    tensor: torch.Tensor  # a view, no copy
    offsets: list[int]  # of its first element in the whole tensor


def own_pieces(tensors: dict[str, torch.Tensor]) -> dict[str, Piece]:
    """Return what this rank writes of each tensor: its shard on the first replica, plain tensors on rank 0."""
    pieces = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if distributed.is_main():
                pieces[name] = Piece(tensor, [0] * tensor.dim())
            continue
        coordinate: list[int] = list(tensor.device_mesh.get_coordinate() or [])
        first_replica = all(c == 0 for c, p in zip(coordinate, tensor.placements) if isinstance(p, Replicate))
        shard = tensor.to_local()
        if first_replica and shard.numel() > 0:
            chunk = tensor.__create_chunk_list__()[0]  # DCP's own question to a DTensor: which part is here
            pieces[name] = Piece(shard, list(chunk.offsets))
    return pieces


@dataclass(frozen=True)
class WrittenFile:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def write_pieces(pieces: dict[str, Piece], file: Path) -> WrittenFile:
    """Write ``pieces`` to ``file`` with their places in the whole tensors, flushed to disk.

    Raises:
        OSError: the disk refuses.
    """
    offsets = {name: {SAVED_OFFSETS_KEY: piece.offsets} for name, piece in pieces.items()}
    tensors = {name: piece.tensor for name, piece in pieces.items()}
    return write_safetensors(tensors, file, {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})


def write_safetensors(
    tensors: dict[str, torch.Tensor],
    file: Path,
    metadata: dict[str, str],
    contents: Iterable[torch.Tensor] | None = None,
) -> WrittenFile:
    """Write a safetensors file at once or not at all, flushed to disk, holding one tensor at a time.

    safetensors' own function copies them all.

    Args:
        tensors: by name, on any device.
        file: written with the mode that the umask gives.
        metadata: of the file's header.
        contents: the tensors in this order, made one by one, where ``tensors`` on ``meta`` only describe them.

    Raises:
        OSError: the disk refuses.
    """
    start = _header(tensors, metadata)
    digest, size = hashlib.sha256(start), len(start)
    with replacing_file(file) as stream:
        stream.write(start)
        for tensor in tensors.values() if contents is None else contents:
            if tensor.numel():
                content = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                stream.write(content)
                digest.update(content)
                size += content.nbytes
    return WrittenFile(size, digest.hexdigest())


def _header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Return length and JSON header of the safetensors format (https://github.com/huggingface/safetensors#format)."""
    entries: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
        self._files: dict[Path, Any] = {}
        self.pieces: dict[str, list[StoredPiece]] = {}
        self._open(directory, None)
        for other, names in (external or {}).items():
            self._open(other, set(names))

    def _open(self, directory: Path, wanted: set[str] | None) -> None:
        for file in sorted(directory.glob("*.safetensors")):
            opened = self._files[file] = safe_open(file, framework="pt")
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
