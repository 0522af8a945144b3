"""The first row of files, which says their format: looked at before a rank starts, so nothing slow is imported."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from lisa_dist.config import DataConfig, UserError
from lisa_dist.data.formats import BadRowError, choose_format
from lisa_dist.data.locate import folder_of, is_local, locate, path_of
from lisa_dist.data.readers import DECOMPRESSORS, BrokenRow, kind_of, read_rows

LARGEST_LIST = 32 << 20  # bytes of a JSON file, which is read as a whole: about half a second


def check_rows(config: DataConfig, key: str = "data.path") -> None:
    """Raise :class:`UserError` where files of this machine hold no row, or a first one that can't be read.

    Args:
        config: which rows and how they are read; a file of ``data.validation`` is looked at too.
        key: the configuration key that ``config.path`` came from, for messages.
    """
    found = locate(path_of(config, key), config.split, key, config.subset)
    if found is not None:
        _check_first(config, found[0], key, path_of(config, key))
    validation = config.validation if config.validation_fraction is None else None
    if validation is not None and is_local(validation) and folder_of(validation, "data.validation") is None:
        files, _ = locate(validation, key="data.validation") or ([], [])
        _check_first(config, files, "data.validation", validation)


def _check_first(config: DataConfig, files: list[Path], key: str, name: str) -> None:
    if any(kind_of(file) == ".json" and _size(file) > LARGEST_LIST for file in files[:1]):
        return
    first = next(chain.from_iterable(map(read_rows, files)), None)
    if first is None:
        raise no_rows(key, name)
    strict = config.on_bad_row == "error"
    if isinstance(first, BrokenRow):
        if strict:
            raise bad_row(key, name, first.place, first.reason)
        return  # which row is the first whole one is seen when they are tokenized
    chosen = choose_format(config.format, config.columns, first.values)
    try:
        chosen.to_sample(first.values)
    except BadRowError as error:
        if strict:
            raise bad_row(key, name, first.place, str(error)) from error


def _size(file: Path) -> float:
    return file.stat().st_size if file.suffix.lower() not in DECOMPRESSORS else 10 * file.stat().st_size


def no_rows(key: str, name: str) -> UserError:
    """Return the error that the files which ``key`` names hold nothing."""
    return UserError(f"{key}={name}: the data set is empty")


def bad_row(key: str, name: str, place: str, reason: str) -> UserError:
    """Return the error that a row of the files which ``key`` names can't be used."""
    return UserError(f"{key}={name}: {place}: {reason}; fix the row, or set data.on_bad_row=skip")
