"""What a path names: a file, a glob, a Hugging Face directory, a hub id, or bundled data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from lisa_dist.config import UserError
from lisa_dist.config.errors import in_one_line, nearest
from lisa_dist.config.paths import nearest_path
from lisa_dist.data.folders import find_split
from lisa_dist.data.locate import folder_of, locate
from lisa_dist.data.readers import BrokenRow, Row, count_rows, kind_of, read_rows
from lisa_dist.runtime.files import stay_offline_where_unreachable


@dataclass(frozen=True)
class Source:
    """What a path names: files of this machine, or a data set that ``datasets`` has opened."""

    name: str
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was decided that the user should know
    dataset: datasets.Dataset | None = None
    fingerprint: str = ""  # of ``dataset``

    def rows(self) -> Iterator[Row | BrokenRow]:
        """Yield every row in order, broken ones as :class:`BrokenRow`.

        Raises:
            UserError: a file is broken as a whole, or has no rows' shape.
        """
        if self.dataset is not None:
            for index, values in enumerate(self.dataset):
                yield Row(values, self.name, index + 1, "row")
        for file in self.files:
            yield from read_rows(file)

    def count_rows(self) -> int | None:
        """Return how many rows there are, None where only reading them would tell."""
        if self.dataset is not None:
            return len(self.dataset)
        counts = [count_rows(file) for file in self.files]
        return None if None in counts else sum(count for count in counts if count is not None)

    def content_hash(self) -> str:
        """Return a hash of the content: of every byte of the files, or of what ``datasets`` knows its data by.

        Raises:
            UserError: a file can't be read.
        """
        digest = hashlib.sha256(self.fingerprint.encode())
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{file}: can't be read ({error.strerror})") from error
            digest.update(f"{kind_of(file)}{file.suffix}:{content}\n".encode())
        return digest.hexdigest()


def find_source(path: str, split: str = "train", key: str = "data.path", subset: str | None = None) -> Source:
    """Find what ``path`` names. What exists under this very name comes before any pattern.

    Args:
        path: a file (.json, .jsonl, .csv, .tsv, .parquet, .txt; those of text also as .gz, .bz2 or .xz), a glob, a
            directory (written by ``Dataset.save_to_disk``, or laid out as data sets of the hub are), a hub id, or
            ``builtin:demo``.
        split: which split of a directory or a hub data set.
        key: the configuration key that ``path`` came from, for messages.
        subset: which subset of a directory or a hub data set; None where it has but one, or a default.

    Raises:
        UserError: nothing is there, or it holds nothing that can be read.
    """
    files = locate(path, split, key, subset)
    if files is not None:
        return Source(path, *files)
    folder = folder_of(path, key)
    return _find_on_hub(path, split, key, subset) if folder is None else _open_saved(folder, path, split, key)


def has_split(path: str, split: str, subset: str | None = None) -> bool:
    """Whether ``path`` is a directory, or bundled, that has ``split``; the hub is not asked."""
    with suppress(UserError):
        return folder_of(path) is not None and find_source(path, split, subset=subset) is not None
    return False


def _open_saved(folder: Path, path: str, split: str, key: str) -> Source:
    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds; all mean that this is no whole data set
        raise UserError(f"{key}={path}: can't be opened as what save_to_disk writes ({in_one_line(error)})") from error
    if isinstance(opened, datasets.DatasetDict):
        name = find_split(opened, split)
        if name is None:
            raise UserError(
                f"{key}={path}: the data set has no split {split}, it has {', '.join(opened)}{nearest(split, opened)}"
            )
        opened = opened[name]
    elif split != "train":
        raise UserError(f"{key}={path}: the data set was saved without splits, so split {split} is not there")
    plain = opened.with_format(None, columns=opened.format["columns"])  # it may have been saved as one of tensors
    return Source(path, dataset=plain, fingerprint=opened._fingerprint)


def _find_on_hub(path: str, split: str, key: str, subset: str | None) -> Source:
    stay_offline_where_unreachable()
    name, _, named = path.partition(":")  # openai/gsm8k:main names a subset of a data set
    if subset and named and subset != named:
        raise UserError(f"data.subset={subset}: {key}={path} names another subset")
    try:
        dataset = datasets.load_dataset(name, subset or named or None, split=split)
    except Exception as error:  # the client raises a dozen kinds; all mean that the data cannot be had
        where = Path(path).absolute()
        raise UserError(
            f"{key}={path}: no such file or directory, looked at {where}{nearest_path(where)}; "
            f"and as a data set of the hub, split {split}, it cannot be had ({in_one_line(error)})"
        ) from error
    return Source(path, dataset=dataset, fingerprint=dataset._fingerprint)
