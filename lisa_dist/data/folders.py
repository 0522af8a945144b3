"""The folder of a data set, read as ``datasets`` reads it: subsets of its README, names of splits, stray files.

The rules are those of https://huggingface.co/docs/datasets/repository_structure.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lisa_dist.config import UserError
from lisa_dist.config.errors import nearest
from lisa_dist.config.paths import path_exists
from lisa_dist.data.readers import READERS, kind_of

CARDS = ("README.md", ".huggingface.yaml")  # where subsets are listed; the later one wins
NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
STRAY_TEXTS = re.compile(r"^(readme|licen[cs]e|notice|copying|changelog|citation|authors|requirements)\b.*", re.I)
OF_THE_REPOSITORY = (".md", ".py", ".yaml", ".yml", ".sh", ".png", ".jpg", ".svg", ".pdf", ".ipynb", ".bib", ".cff")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")  # data/SPLIT-00000-of-00001.parquet
MODULES = {".ndjson": ".jsonl", ".json": ".jsonl", ".tsv": ".csv"}  # kinds that are read together
PREFERRED = (".txt", ".csv", ".jsonl", ".parquet")  # the last one first, where a folder has as many of two kinds
CHANGES_READING = (
    *("sep", "delimiter", "header", "names", "column_names", "index_col", "usecols", "encoding", "quotechar"),
    *("escapechar", "skiprows", "nrows", "na_values", "field", "columns", "filters", "sample_by"),
)  # keys of a subset that datasets hands to its readers


def subsets_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the subsets that the folder's README lists under ``configs``, by name; {} where it lists none.

    Raises:
        UserError: what it lists is no such list.
    """
    card: dict[str, Any] = {}
    for name in CARDS:
        if (folder / name).is_file():
            card |= _read_card(folder / name)
    found = card.get("configs") or []
    where = f"{folder / CARDS[0]}: configs"
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.get("config_name") for one in found):
        raise UserError(f"{where} must be a list of subsets, each with a config_name")
    return {str(one["config_name"]): one for one in found}


def _read_card(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix == ".md":
        header = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t\r]*$", text, re.DOTALL | re.MULTILINE)
        text = header[1] if header else ""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: its header can't be read as YAML ({' '.join(str(error).split())})") from error
    return content if isinstance(content, dict) else {}


def find_files(folder: Path, path: str, split: str, subset: str | None, key: str) -> tuple[list[Path], list[str]]:
    """Return the files of ``split`` of a folder, and what was decided that the user should know.

    ``path`` is what the user wrote for the folder, as the value of ``key``.

    Raises:
        UserError: there is no such subset or split, several subsets and none chosen, or nothing that can be read.
    """
    chosen, notes = _choose_subset(subsets_of(folder), path, subset, key)
    _check_reading(chosen or {}, folder)
    listed = (chosen or {}).get("data_files")
    if listed is not None:
        patterns = _patterns(listed, folder)
        splits = {name: _match_all(folder, mine) for name, mine in patterns.items()}
        every = [file for files in splits.values() for file in files]
    else:
        base = folder / str((chosen or {}).get("data_dir") or "")
        every = _list(base, "**")
        named = {file: file.relative_to(base).as_posix() for file in every if kind_of(file) and not _is_known(file)}
        splits = _by_name(named)
    if not splits:
        raise UserError(f"{key}={path}: the directory holds no file that ends in one of {', '.join(READERS)}")
    name = find_split(splits, split)
    if name is None:
        raise UserError(
            f"{key}={path}: the directory has no split {split}, it has {', '.join(splits)}{nearest(split, splits)}"
        )
    if not splits[name]:
        raise UserError(f"{key}={path}: its README names {', '.join(patterns[name])}, and no file there matches")
    kind = _most_common_kind([file for files in splits.values() for file in files])
    read = [file for file in splits[name] if kind_of(file) and _module(file) == kind]
    if not read:
        raise UserError(
            f"{key}={path}: split {name} has {splits[name][0].name}, and its files must end in one of "
            f"{', '.join(READERS)}, in the same one as those of the other splits"
        )
    if listed is None:
        notes += _in_capitals(named, name, read)
    others = {file for files in splits.values() for file in files if _module(file) == kind}
    unread = sorted(os.path.relpath(file, folder) for file in every if file not in others and not _is_known(file))
    if unread:
        shown = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        notes.append(f"{len(unread)} files of the directory are not read: {shown}")
    return read, notes


def find_split(splits: dict[str, Any], split: str) -> str | None:
    """Return which of ``splits`` is meant by ``split``: the one of this name, or of one that says the same (val)."""
    if split in splits:
        return split
    return next((name for name in splits if name.lower() in KEYWORDS.get(split, ())), None)


def _choose_subset(
    subsets: dict[str, dict[str, Any]], path: str, subset: str | None, key: str
) -> tuple[dict[str, Any] | None, list[str]]:
    names = ", ".join(subsets)
    if subset is not None:
        if subset not in subsets:
            have = f"it has {names}{nearest(subset, subsets)}" if subsets else "its README lists none"
            raise UserError(f"data.subset={subset}: {path} has no such subset, {have}")
        return subsets[subset], []
    if len(subsets) <= 1:
        return next(iter(subsets.values()), None), []
    default = [name for name, one in subsets.items() if name == "default" or one.get("default")]
    if len(default) != 1:
        raise UserError(f"{key}={path}: has the subsets {names}; choose one with data.subset=NAME")
    return subsets[default[0]], [f"of the subsets {names} the default, {default[0]}, is read (data.subset)"]


def _patterns(listed: object, folder: Path) -> dict[str, list[str]]:
    """Return the patterns of each split of a subset's ``data_files``."""
    entries = listed if isinstance(listed, list) else [listed]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths = paths if isinstance(paths, list) else [paths]
        if split is None or not all(isinstance(pattern, str) for pattern in paths):
            raise UserError(
                f"{folder / CARDS[0]}: data_files must be a path, a list of paths, or a list of split and path, "
                f"found {listed}"
            )
        found.setdefault(str(split), []).extend(paths)
    return found


def _check_reading(subset: dict[str, Any], folder: Path) -> None:
    changing = [key for key in subset if key in CHANGES_READING]
    if changing:
        raise UserError(
            f"{folder / CARDS[0]}: subset {subset['config_name']} sets {changing[0]}, which changes how its files are "
            f"read and is not supported; name the files themselves in data.path"
        )


def _match_all(folder: Path, patterns: list[str]) -> list[Path]:
    """Return the files that any of the patterns matches, each one once; a file of this very name comes first."""
    found = [[folder / pattern] if path_exists(folder / pattern) else _list(folder, pattern) for pattern in patterns]
    return list(dict.fromkeys(file for files in found for file in files if file.is_file()))


def _list(folder: Path, pattern: str) -> list[Path]:
    """Return the files that match; hidden ones, and folders such as __pycache__, have to be named by ``pattern``."""
    names = sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207 (takes brackets in the root)
    special = sum(part.startswith("__") for part in Path(pattern).parts)
    kept = [name for name in names if sum(part.startswith("__") for part in Path(name).parent.parts) <= special]
    return [folder / name for name in kept if (folder / name).is_file()]


def _is_known(file: Path) -> bool:
    """Whether a file is one that folders of data usually have in addition to the data."""
    stray = STRAY_TEXTS.match(file.name) and kind_of(file) in ("", ".txt")
    return file.name in NOT_DATA or bool(stray) or (file.suffix.lower() in OF_THE_REPOSITORY)


def _in_capitals(names: dict[Path, str], split: str, read: list[Path]) -> list[str]:
    """Return what to say of files that are read for ``split``, and in small letters would be of another one."""
    meant = _by_name({file: name.lower() for file, name in names.items()}).get(split.lower(), [])
    strays = [names[file] for file in read if file not in meant]
    if not strays:
        return []
    shown = ", ".join(strays[:5]) + (", ..." if len(strays) > 5 else "")
    return [f"{shown}: read for {split}, for names of splits count in small letters alone, as datasets reads them"]


def _by_name(names: dict[Path, str]) -> dict[str, list[Path]]:
    """Return the files of each split by their names: of shards, of folders, of files; else all are for training."""
    shards = [(file, match[1]) for file, name in names.items() if (match := SHARD.fullmatch(name))]
    if shards:
        return {split: [file for file, of in shards if of == split] for split in sorted({of for _, of in shards})}
    for parts_of in (lambda name: name.split("/")[:-1], lambda name: name.split("/")[-1:]):
        found = {
            split: [file for file, name in names.items() if any(_names_split(split, part) for part in parts_of(name))]
            for split in KEYWORDS
        }
        if any(found.values()):
            return {split: matching for split, matching in found.items() if matching}
    return {"train": list(names)} if names else {}


def _names_split(split: str, part: str) -> bool:
    return bool(re.search(rf"(^|[-._ 0-9])({'|'.join(KEYWORDS[split])})($|[-._ 0-9])", part))


def _module(file: Path) -> str:
    kind = kind_of(file)
    return MODULES.get(kind, kind)


def _most_common_kind(files: list[Path]) -> str:
    """Return the kind that most files are of, for a folder's files are of one; texts only where nothing else is."""
    counts = Counter(_module(file) for file in files if kind_of(file))
    return max(counts, key=lambda kind: (kind != ".txt", counts[kind], PREFERRED.index(kind)), default="")
