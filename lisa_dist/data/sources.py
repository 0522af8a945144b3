"""Where rows come from: JSON, JSON lines, CSV, Parquet, text, a glob, a Hugging Face directory, a hub id.

JSON lines and CSV are read line by line rather than by pyarrow: a broken line is then reported by its number,
and no text is taken for a date or a number. Parquet, saved data sets and the hub go through Arrow.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest

BUILTIN_PREFIX = "builtin:"
SUFFIXES = [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt"]
SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class Row:
    """One row as the file has it, and where it stands; ``number`` counts from 1 (a line, or a row of a table)."""

    values: dict[str, Any]
    file: str
    number: int
    unit: str = "line"

    @property
    def place(self) -> str:
        """``FILE, line N``, for messages."""
        return f"{self.file}, {self.unit} {self.number}"


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not be read, and why."""

    place: str
    reason: str


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
            yield from _READERS[file.suffix](file)

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
    if glob.has_magic(path):
        files = [Path(name) for name in sorted(glob.glob(str(Path(path).expanduser()), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{key}={path}: no file matches, looked from {Path.cwd()}")
        return Source(path, [_checked(file, key) for file in files])
    here = Path(path).expanduser()
    if here.is_dir():
        return _find_directory(here, path, split, key)
    if here.is_file():
        return Source(path, [_checked(here, key)])
    if HUB_ID.match(path) and here.suffix not in SUFFIXES:
        return _find_on_hub(path, split, key)
    raise UserError(f"{key}={path}: no such file or directory, looked at {here.absolute()}{_nearest_path(here)}")


def has_split(path: str, split: str) -> bool:
    """Whether ``path`` is a directory, or bundled, that has ``split``; the hub is not asked."""
    if not path.startswith(BUILTIN_PREFIX) and not Path(path).expanduser().is_dir():
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
    try:
        dataset = datasets.load_dataset(path, split=split)
    except Exception as error:  # the client raises a dozen kinds; all mean that the data cannot be had
        reason = " ".join(str(error).split())[:200]
        where = Path(path).absolute()
        raise UserError(
            f"{key}={path}: no such file or directory, looked at {where}{_nearest_path(where)}; "
            f"and as a data set of the hub, split {split}, it cannot be had ({reason})"
        ) from error
    return Source(path, dataset=dataset, fingerprint=dataset._fingerprint)


def _read_json(file: Path) -> Iterator[Row | BrokenRow]:
    """Read a JSON list of rows or ``{"data": [...]}``; JSON lines under either name are read as such."""
    with file.open("rb") as stream:
        first_line = stream.readline().removeprefix(b"\xef\xbb\xbf").strip()
        lines = not first_line.startswith(b"[") and file.suffix != ".json"
        if file.suffix == ".json" and first_line.startswith(b"{") and stream.read(1):
            lines = _is_json(first_line)  # a whole object, and more after it
    if lines:
        yield from _read_json_lines(file)
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = f"an object with {', '.join(map(str, content))}" if isinstance(content, dict) else type(rows).__name__
        raise UserError(f'{file}: must be a list of rows or {{"data": [...]}}, found {found}')
    for index, values in enumerate(rows):
        if isinstance(values, dict):
            yield Row(values, str(file), index + 1, "row")
        else:
            yield BrokenRow(f"{file}, row {index + 1}", f"must be an object, found {type(values).__name__}")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_json_lines(file: Path) -> Iterator[Row | BrokenRow]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except UnicodeDecodeError as error:
                yield BrokenRow(place, f"not UTF-8 text (byte {error.start})")
                continue
            except json.JSONDecodeError as error:
                yield BrokenRow(place, f"not valid JSON ({error.msg} at character {error.pos + 1})")
                continue
            if isinstance(values, dict):
                yield Row(values, str(file), number)
            else:
                yield BrokenRow(place, f"must be an object, found {type(values).__name__}")


def _read_csv(file: Path) -> Iterator[Row | BrokenRow]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than a long answer
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            place = f"{file}, line {reader.line_num + 1}"
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield BrokenRow(place, f"not valid CSV ({error})")
                continue
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: not UTF-8 text (near line {reader.line_num + 1})") from error
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                yield BrokenRow(place, f"has {len(fields)} fields, the header has {len(header)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), str(file), number)


def _read_parquet(file: Path) -> Iterator[Row | BrokenRow]:
    try:
        table = parquet.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from error
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for values in batch.to_pylist():
            number += 1
            yield Row(values, str(file), number, "row")


def _read_text(file: Path) -> Iterator[Row | BrokenRow]:
    """Read plain text: paragraphs, parted by blank lines, are rows with the one column ``text``."""
    paragraph: list[str] = []
    start = 1
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    start = start if paragraph else number
                    paragraph.append(line)
                elif paragraph:
                    yield Row({"text": "".join(paragraph).rstrip("\n")}, str(file), start)
                    paragraph = []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text") from error
    if paragraph:
        yield Row({"text": "".join(paragraph).rstrip("\n")}, str(file), start)


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
