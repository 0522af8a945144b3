"""The safetensors files of a Hugging Face directory, read by slices."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lisa_dist.config import UserError
from lisa_dist.config.paths import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    check_has_weights,
    check_model_directory,
    model_directory,
)
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import check_is_whole, read_json_object

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DOWNLOADED = ["*.safetensors", INDEX_FILE, MODEL_CONFIG, ADAPTER_CONFIG]
DTYPES = {  # by safetensors' names
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, memory-mapped: reading a slice touches only its pages.

    Files are opened when they are first read. Of one file and an index the file is read, as by transformers.

    Raises:
        UserError: there are no safetensors in it, or the index is broken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self.indexed = (directory / INDEX_FILE).is_file() and not (directory / SINGLE_FILE).is_file()
        self.file_of: dict[str, str] = self._read_index() if self.indexed else self._read_headers()

    def _read_index(self) -> dict[str, str]:
        weight_map = read_json_object(self.directory / INDEX_FILE, self._key).get("weight_map")
        named = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
        if not named or not weight_map:
            raise UserError(f"{self._key}: {INDEX_FILE} has no weight_map, which names the file of each tensor")
        return weight_map

    def _read_headers(self) -> dict[str, str]:
        check_has_weights(self.directory, self._key, or_random=True)
        single = self.directory / SINGLE_FILE
        files = [single] if single.is_file() else sorted(self.directory.glob("*.safetensors"))
        self._check_parts([file.name for file in files])
        found: dict[str, str] = {}
        for file in files:
            for name in self._open(file.name).keys():  # noqa: SIM118  a safetensors file is no mapping
                if name in found:
                    raise UserError(
                        f"{self._key}: both {found[name]} and {file.name} hold {name}, and no {INDEX_FILE} says which "
                        "counts; remove one"
                    )
                found[name] = file.name
        return found

    def _check_parts(self, files: list[str]) -> None:
        """Refuse numbered files of which some are not there."""
        for file in files:
            match = re.fullmatch(r"(.*-)(\d+)(-of-(\d+)\.safetensors)", file)
            if match is None:
                continue
            names = [f"{match[1]}{number:0{len(match[2])}}{match[3]}" for number in range(1, int(match[4]) + 1)]
            absent = sorted(set(names) - set(files))
            if absent:
                raise UserError(f"{self._key}: {file} is there but not {absent[0]}; copy or download it again")

    def check_files(self) -> None:
        """Open every file, and compare what they hold with the index.

        Raises:
            UserError: a file is not there, is cut short, is no safetensors file, or the index is that of other files.
        """
        passed_over = (self.directory / INDEX_FILE).is_file() and not self.indexed
        if passed_over and set(self._read_index().values()) != {SINGLE_FILE}:
            logger.warning(
                "%s: holds both %s and %s; the first is read, as by transformers, and the files that the second names "
                "are not",
                *(self._key, SINGLE_FILE, INDEX_FILE),
            )
        for file in sorted(set(self.file_of.values())):
            held = set(self._open(file).keys())
            wanted = {name for name, holder in self.file_of.items() if holder == file}
            for names, says in (
                (wanted - held, "puts {} in {}, which lacks it"),
                (held - wanted, "leaves out {} of {}"),
            ):
                if names:
                    raise UserError(
                        f"{self._key}: {INDEX_FILE} {says.format(min(names), file)}; the index is that of other files, "
                        "so copy or download the directory again"
                    )

    @property
    def _key(self) -> str:
        return f"model.path={self.directory}"

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise UserError(f"{self._key}: {INDEX_FILE} names {file}, which is not there; copy or download it")
            check_is_whole(path, self._key)
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self._key}: {file} ({path.stat().st_size} bytes) is cut short or no safetensors file ({error}); "
                    "copy or download it again"
                ) from error
        return self._files[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._open(self.file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; uint8 for any that torch has no plain type for."""
        return DTYPES.get(self.stored_type(name), torch.uint8)

    def stored_type(self, name: str) -> str:
        """Return the file's own name of a tensor's type, as F8_E4M3."""
        return self._open(self.file_of[name]).get_slice(name).get_dtype()

    def read(self, name: str, region: tuple[slice, ...] = ()) -> Tensor:
        """Return a tensor, or a region of it, in the file's dtype."""
        file = self._open(self.file_of[name])
        return file.get_slice(name)[region] if region else file.get_tensor(name)


def weights_directory(path: str) -> Path:
    """Return the directory with the weights of ``path``, downloaded first if it is a hub id. Collective: every rank.

    Raises:
        UserError: it can't be downloaded, or holds an adapter too.
    """
    directory = model_directory(path)
    if directory is not None:
        return directory

    def download() -> Path:
        try:
            # "consolidated" files are the same weights in another layout
            found = Path(snapshot_download(path, allow_patterns=DOWNLOADED, ignore_patterns=["consolidated*"]))
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.path={path}: can't be downloaded from the hub ({reason})") from error
        check_model_directory(found, f"model.path={path}")
        return found

    distributed.on_local_rank_zero(download)
    return download()  # from the cache of this machine
