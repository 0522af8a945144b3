"""Which files a path names, without opening them: told before a rank starts, so nothing slow is imported here."""

from __future__ import annotations

import glob
from contextlib import suppress
from pathlib import Path

from lisa_dist.config import DataConfig, UserError
from lisa_dist.config.paths import BUILTIN_PREFIX, HUB_ID, builtin_directory, local_path, nearest_path, path_exists
from lisa_dist.data.folders import find_files, subsets_of
from lisa_dist.data.readers import READERS, kind_of


def check_data(config: DataConfig) -> None:
    """Raise :class:`UserError` where no data are named, or what is named is not on this machine nor like a hub id."""
    locate(path_of(config), config.split, "data.path", config.subset)
    if config.validation is not None and config.validation_fraction is None and not is_local(config.validation):
        locate(config.validation, key="data.validation")


def path_of(config: DataConfig, key: str = "data.path") -> str:
    """Return ``data.path``; :class:`UserError` where it is not set. ``key`` is what it came from, for messages."""
    if config.path is None:
        raise UserError(f"{key}=null: must name a file, a glob, a directory, a hub id, or builtin:demo")
    return config.path


def locate(
    path: str, split: str = "train", key: str = "data.path", subset: str | None = None
) -> tuple[list[Path], list[str]] | None:
    """Return the files that ``path`` names and what was decided that the user should know.

    None where ``datasets`` has to open it: a directory that ``Dataset.save_to_disk`` wrote, or a hub id.

    Args:
        path, split, key, subset: as in :func:`lisa_dist.data.sources.find_source`.

    Raises:
        UserError: nothing is there, or it holds nothing that can be read.
    """
    if not path.strip():
        raise UserError(f"{key}={path}: must name a file, a glob, a directory, a hub id, or builtin:demo")
    folder = folder_of(path, key)
    if folder is not None:
        return _locate_in(folder, path, split, key, subset)
    here = local_path(path)
    if path_exists(here) or glob.has_magic(path):
        if split != "train":
            raise UserError(f"{key}={path}: a file has no splits, so split {split} can't be chosen; name its own file")
        if subset is not None:
            raise UserError(f"data.subset={subset}: {path} is a file, and only data sets have subsets")
    if path_exists(here):
        return [_checked(here, key)], []
    if glob.has_magic(path):
        files = _match(path)
        if not files:
            raise UserError(f"{key}={path}: no file matches, looked from {Path.cwd()}")
        return [_checked(file, key) for file in files], []
    if HUB_ID.match(path) and not kind_of(here):
        return None
    raise UserError(f"{key}={path}: no such file or directory, looked at {here.absolute()}{nearest_path(here)}")


def _match(pattern: str) -> list[Path]:
    """Return the files that match; the folders at its beginning that exist under their very names are no patterns."""
    parts = list(local_path(pattern).parts)
    root = Path(parts.pop(0)) if Path(parts[0]).is_absolute() else Path()
    while len(parts) > 1 and path_exists(root / parts[0]):
        root = root / parts.pop(0)
    names = glob.glob(str(Path(*parts)), root_dir=root, recursive=True)  # noqa: PTH207 (takes brackets in the root)
    return [root / name for name in sorted(names) if (root / name).is_file()]


def is_local(path: str) -> bool:
    """Whether ``path`` names something on this machine rather than on the hub."""
    return path.startswith(BUILTIN_PREFIX) or path_exists(local_path(path)) or glob.has_magic(path)


def folder_of(path: str, key: str = "data.path") -> Path | None:
    """Return the directory that ``path`` names, ``builtin:NAME`` one of this package; None where it is no directory."""
    if path.startswith(BUILTIN_PREFIX):
        return builtin_directory(path, key, Path(__file__).parent, "train.jsonl")
    here = local_path(path)
    return here if path_exists(here) and here.is_dir() else None


def has_subset(path: str, subset: str | None) -> bool:
    """Whether ``path`` is a directory whose README lists ``subset``; the hub is not asked."""
    with suppress(UserError):  # which is raised under the right key when the data are read
        folder = folder_of(path)
        return folder is not None and subset in subsets_of(folder)
    return False


def _locate_in(
    folder: Path, path: str, split: str, key: str, subset: str | None
) -> tuple[list[Path], list[str]] | None:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if subset is not None:
            raise UserError(f"data.subset={subset}: {path} was saved by save_to_disk, which keeps no subsets")
        return None
    return find_files(folder, path, split, subset, key)


def _checked(file: Path, key: str) -> Path:
    if not kind_of(file):
        raise UserError(f"{key}={file}: the name must end in one of {', '.join(READERS)}")
    return file
