"""The safetensors files of a Hugging Face directory, read by slices."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from lisa_dist import distributed
from lisa_dist.config import UserError
from lisa_dist.models.architecture import local_directory

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = ["*.safetensors", INDEX_FILE, "config.json"]
# safetensors' names of the floating-point types that are converted
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, memory-mapped: reading a slice touches only its pages.

    Raises:
        UserError: there are no safetensors in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.file_of: dict[str, str] = self._index()

    def _index(self) -> dict[str, str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            return json.loads(index.read_text())["weight_map"]
        single = self.directory / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(file.name for file in self.directory.glob("*.bin"))
            advice = (
                f"has {pickled[0]} but no safetensors; unpickling runs code, so convert it first: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
                if pickled
                else "has no *.safetensors, so there are no weights to load; model.init=random starts without"
            )
            raise UserError(f"model.path={self.directory}: {advice}")
        return {name: file.name for file in files for name in self._open(file.name).keys()}  # noqa: SIM118

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise UserError(f"model.path={self.directory}: {INDEX_FILE} names {file}, which is not there")
            self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._open(self.file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; uint8 stands for any that is no ordinary floating-point type."""
        return DTYPES.get(self._open(self.file_of[name]).get_slice(name).get_dtype(), torch.uint8)

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """Return a tensor, or a region of it, in the file's dtype."""
        file = self._open(self.file_of[name])
        return file.get_slice(name)[region] if region else file.get_tensor(name)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def weights_directory(path: str) -> Path:
    """Return the directory with the weights of ``path``, downloaded first if it is a hub id. Collective: every rank."""
    directory = local_directory(path)
    if directory is not None:
        return directory
    with distributed.local_rank_zero_first():
        try:
            # "consolidated" files are the same weights in another layout
            return Path(snapshot_download(path, allow_patterns=WEIGHT_FILES, ignore_patterns=["consolidated*"]))
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.path={path}: can't be downloaded from the hub ({reason})") from error


def weights_dtype(path: str | Path) -> torch.dtype:
    """Return the floating-point dtype of most of the weights of a directory."""
    weights = SafetensorsDirectory(Path(path))
    sizes: Counter[torch.dtype] = Counter()
    for name in weights.file_of:
        sizes[weights.dtype(name)] += torch.Size(weights.shape(name)).numel()
    weights.close()
    return max((dtype for dtype in sizes if dtype.is_floating_point), key=lambda dtype: sizes[dtype])
