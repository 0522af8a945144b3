"""Rows out of files: JSON, JSON lines, CSV, Parquet, plain text; what is text also compressed.

JSON lines and CSV are read line by line rather than by pyarrow: a broken line is then reported by its number,
and no text is taken for a date or a number.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as parquet

from lisa_dist.config import UserError
from lisa_dist.data.messages import BadRowError, keys_once


@dataclass(frozen=True)
class Row:
    """One row as the file has it, and where in it; ``number`` counts from 1 (a line, or a row of a table)."""

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


DECOMPRESSORS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def kind_of(file: Path) -> str:
    """Return the key of :data:`READERS` that reads ``file``, by its name; "" where none does."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    kind = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in DECOMPRESSORS else (suffixes or [""])[-1]
    readable = kind in READERS and (kind != ".parquet" or suffixes[-1] == kind)
    return kind if readable else ""


def read_rows(file: Path) -> Iterator[Row | BrokenRow]:
    """Yield the rows of a file in order, broken ones as :class:`BrokenRow`.

    Raises:
        UserError: the file is broken as a whole, or can't be read.
    """
    try:
        yield from READERS[kind_of(file)](file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: can't be read ({error})") from error


def count_rows(file: Path) -> int | None:
    """Return about how many rows a file has, for a progress bar; None where only reading them would tell."""
    try:
        if kind_of(file) == ".parquet":
            return parquet.read_metadata(file).num_rows
        if kind_of(file) in (".jsonl", ".ndjson") and file.suffix.lower() not in DECOMPRESSORS:
            with file.open("rb") as stream:
                return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    except (pa.ArrowInvalid, OSError):  # read_rows says what is wrong
        pass
    return None


def _open(file: Path) -> BinaryIO:
    return DECOMPRESSORS.get(file.suffix.lower(), open)(file, "rb")


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    opener = DECOMPRESSORS.get(file.suffix.lower(), open)
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def _read_json(file: Path) -> Iterator[Row | BrokenRow]:
    """Read a JSON list of rows or ``{"data": [...]}``; JSON lines under either name are read as such."""
    whole = kind_of(file) == ".json"
    with _open(file) as stream:
        first_line = stream.readline().removeprefix(b"\xef\xbb\xbf").strip()
        lines = not first_line.startswith(b"[") and not whole
        if whole and first_line.startswith(b"{") and stream.read(1):
            lines = _is_json(first_line)  # a whole object, and more after it
    if lines:
        yield from _read_json_lines(file)
        return
    try:
        with _open_text(file) as text:
            content = json.load(text, object_pairs_hook=keys_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except (BadRowError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: {_what_is_wrong(error)}") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        found = f"an object with {', '.join(map(str, content))}" if isinstance(content, dict) else type(rows).__name__
        raise UserError(f'{file}: must be a list of rows or {{"data": [...]}}, found {found}')
    for index, values in enumerate(rows):
        if isinstance(values, dict):
            yield Row(values, str(file), index + 1, "row")
        else:
            yield BrokenRow(f"{file}, row {index + 1}", f"must be an object, found {type(values).__name__}")


def _what_is_wrong(error: Exception) -> str:
    """Return why something is no JSON, by what reading it has raised."""
    if isinstance(error, BadRowError):
        return str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at character {error.pos + 1})"
    return f"not valid JSON ({error})"  # a number of thousands of digits, brackets within brackets


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json_lines(file: Path) -> Iterator[Row | BrokenRow]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                values = json.loads(line, object_pairs_hook=keys_once)
            except (BadRowError, ValueError, RecursionError) as error:
                yield BrokenRow(place, _what_is_wrong(error))
                continue
            if isinstance(values, dict):
                yield Row(values, str(file), number)
            else:
                yield BrokenRow(place, f"must be an object, found {type(values).__name__}")


def _read_csv(file: Path) -> Iterator[Row | BrokenRow]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is shorter than a long answer
    with _open_text(file, newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            place = f"{file}, line {reader.line_num + 1}"
            number = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                if str(error) == "unexpected end of data":  # inside of quotes: how many rows they took in is not known
                    raise UserError(
                        f"{place}: a quote that opens in this row is not closed by the file's end"
                    ) from error
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
                _check_columns(header, f"{place}: the header")
            elif len(fields) != len(header):
                yield BrokenRow(place, f"has {len(fields)} fields, the header has {len(header)}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), str(file), number)


def _check_columns(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} names column {twice} twice, so its values can't be told apart")


def _read_parquet(file: Path) -> Iterator[Row | BrokenRow]:
    number = 0
    try:
        table = parquet.ParquetFile(file)
        _check_columns(table.schema_arrow.names, str(file))
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, str(file), number, "row")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from error


def _read_text(file: Path) -> Iterator[Row | BrokenRow]:
    """Read plain text: paragraphs, with blank lines between them, are rows with the one column ``text``."""
    try:
        with _open_text(file) as stream:
            for is_blank, numbered in groupby(enumerate(stream, start=1), key=lambda line: not line[1].strip()):
                if not is_blank:
                    numbers, lines = zip(*numbered)
                    yield Row({"text": "".join(lines).rstrip("\n")}, str(file), numbers[0])
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text") from error


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
