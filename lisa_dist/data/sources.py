"""What a path stands for: a file, a glob, a Hugging Face directory, a hub id, or bundled data."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest
from lisa_dist.data.readers import READERS, BrokenRow, Row
from lisa_dist.hub import stay_offline_where_unreachable

BUILTIN_PREFIX = "builtin:"
SUFFIXES = list(READERS)
SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
HUB_ID = re.compile(
    r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?$"
)  # owner/name, and after a colon a part of the data set


@dataclass(frozen=True)
class Source:
    """What a path stands for: files of this machine, or a data set that ``datasets`` has opened."""

    name: str
    files: list[Path] = field(default_factory=list)
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
            yield from READERS[file.suffix](file)

    def content_hash(self) -> str:
        """Return a hash of the content: of every byte of the files, or of what ``datasets`` knows its data by."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(f"{file.suffix}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def find_source(path: str, split: str = "train", key: str = "data.path") -> Source:
    """Find what ``path`` stands for.

    Args:
        path: a file (.json, .jsonl, .csv, .tsv, .parquet, .txt), a glob, a directory (written by
            ``Dataset.save_to_disk``, or holding a file or a folder per split), a hub id, or ``builtin:demo``.
        split: which split of a directory or a hub data set.
        key: the configuration key that ``path`` came from, for messages.

    Raises:
        UserError: nothing is there, or it holds nothing that can be read.
    """
    if path.startswith(BUILTIN_PREFIX):
        return _find_directory(builtin_directory(path, key), path, split, key)
    is_file = Path(path).expanduser().is_file()
    if split != "train" and (is_file or glob.has_magic(path)):
        raise UserError(f"{key}={path}: a file has no splits, so split {split} can't be chosen; name its own file")
    if glob.has_magic(path):
        names = glob.glob(str(Path(path).expanduser()), recursive=True)  # noqa: PTH207 (Path.glob refuses absolute ones)
        files = [Path(name) for name in sorted(names)]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{key}={path}: no file matches, looked from {Path.cwd()}")
        return Source(path, [_checked(file, key) for file in files])
    here = Path(path).expanduser()
    if here.is_dir():
        return _find_directory(here, path, split, key)
    if is_file:
        return Source(path, [_checked(here, key)])
    if HUB_ID.match(path) and here.suffix not in SUFFIXES:
        return _find_on_hub(path, split, key)
    raise UserError(f"{key}={path}: no such file or directory, looked at {here.absolute()}{_nearest_path(here)}")


def is_local(path: str) -> bool:
    """Whether ``path`` stands for something on this machine rather than on the hub."""
    return path.startswith(BUILTIN_PREFIX) or glob.has_magic(path) or Path(path).expanduser().exists()


def has_split(path: str, split: str) -> bool:
    """Whether ``path`` is a directory, or bundled, that has ``split``; the hub is not asked."""
    if not is_local(path) or Path(path).expanduser().is_file() or glob.has_magic(path):
        return False
    try:
        find_source(path, split)
    except UserError:
        return False
    return True


def builtin_directory(path: str, key: str = "data.path") -> Path:
    """Return the directory of bundled data named ``builtin:NAME``."""
    root = Path(__file__).parent
    names = sorted(folder.name for folder in root.iterdir() if (folder / "train.jsonl").is_file())
    name = path.removeprefix(BUILTIN_PREFIX)
    if name not in names:
        raise UserError(f"{key}={path}: bundled data are {', '.join(BUILTIN_PREFIX + known for known in names)}")
    return root / name


def _nearest_path(path: Path) -> str:
    folder = path.absolute().parent
    while not folder.is_dir():
        path, folder = folder, folder.parent
    names = {entry.name: str(entry) for entry in folder.iterdir()}
    hint = nearest(path.name, names)
    return hint.replace(hint[len("; did you mean ") : -1], names[hint[len("; did you mean ") : -1]]) if hint else ""


def _checked(file: Path, key: str) -> Path:
    if file.suffix not in SUFFIXES:
        raise UserError(f"{key}={file}: the name must end in one of {', '.join(SUFFIXES)}")
    return file


def _find_directory(folder: Path, path: str, split: str, key: str) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _open_saved(folder, path, split, key)
    available = _split_files(folder)
    if split in available:
        return Source(path, available[split])
    if not available:
        raise UserError(f"{key}={path}: the directory holds no file that ends in one of {', '.join(SUFFIXES)}")
    raise UserError(
        f"{key}={path}: the directory has no split {split}, it has {', '.join(available)}{nearest(split, available)}"
    )


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split; files that name no split are the training split."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    found: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        named = re.compile(rf"^({'|'.join(names)})([-_.].*)?$", re.IGNORECASE)
        matching = [file for file in files if any(named.match(part) for part in file.relative_to(folder).parts)]
        if matching:
            found[split] = matching
    return found if found or not files else {"train": files}


def _open_saved(folder: Path, path: str, split: str, key: str) -> Source:
    opened = datasets.load_from_disk(str(folder))
    if isinstance(opened, datasets.DatasetDict):
        if split not in opened:
            raise UserError(
                f"{key}={path}: the data set has no split {split}, it has {', '.join(opened)}{nearest(split, opened)}"
            )
        opened = opened[split]
    elif split != "train":
        raise UserError(f"{key}={path}: the data set was saved without splits, so split {split} is not there")
    return Source(path, dataset=opened, fingerprint=opened._fingerprint)


def _find_on_hub(path: str, split: str, key: str) -> Source:
    stay_offline_where_unreachable()
    name, _, subset = path.partition(":")  # openai/gsm8k:main names a part of a data set
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the client raises a dozen kinds; all mean that the data cannot be had
        reason = " ".join(str(error).split())[:200]
        where = Path(path).absolute()
        raise UserError(
            f"{key}={path}: no such file or directory, looked at {where}{_nearest_path(where)}; "
            f"and as a data set of the hub, split {split}, it cannot be had ({reason})"
        ) from error
    return Source(path, dataset=dataset, fingerprint=dataset._fingerprint)
