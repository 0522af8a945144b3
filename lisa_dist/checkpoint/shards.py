"""A rank's part of sharded tensors as one safetensors file, in the layout that torch.distributed.checkpoint reads.

The file is written here and not by DCP's own HuggingFaceStorageWriter, whose planning needs collectives, so
that a thread can write while training goes on, one tensor is in host memory at a time, and the checksum costs no
second reading. ``HuggingFaceStorageReader`` reads it at any world size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.tensor import DTensor, Replicate

from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import replacing_file

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
