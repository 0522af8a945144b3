"""A configuration file of the user's: plain YAML with the keys of the command line, in the demonstration's place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from lisa_dist.config import Config
from lisa_dist.config.errors import UserError, as_written, in_one_line
from lisa_dist.config.loading import load
from lisa_dist.config.overrides import PATH_KEYS, SCHEMAS, Written, of_a_directory, write_override
from lisa_dist.config.paths import local_path, nearest_path

SUFFIXES = (".yaml", ".yml")


class _Loader(get_yaml_loader()):  # type: ignore[misc]
    """OmegaConf's, with numbers, and words such as ``on``, as they are written; what they are depends on the key."""


for _kind in ("int", "float", "bool"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}",
        lambda loader, node: Written(re.sub(r"\.(?=inf|nan)", "", node.value, flags=re.IGNORECASE)),
    )


def names_config_file(word: str) -> bool:
    """Whether a word of the command line is a configuration file and no ``key=value``."""
    removes_key = word.startswith("~") and "/" not in word  # in Hydra's grammar
    return ("=" not in word and not removes_key) or (word.endswith(SUFFIXES) and local_path(word).is_file())


def split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file among the words of a command line, None where there is none, and the other words.

    Raises:
        UserError: there are several files, or other words without a value.
    """
    files = [word for word in words if names_config_file(word)]
    if len(files) > 1:
        for word in files:
            if not word.endswith(SUFFIXES):
                raise UserError(f"{word}: must be KEY=VALUE without blanks around =, or a YAML file")
        raise UserError(f"{files[1]}: one configuration file is read, and {files[0]} is given already")
    return (files[0] if files else None), [word for word in words if word not in files]


def file_overrides(word: str, others: list[str], config_dir: str | None = None) -> list[str]:
    """Return what a configuration file says as overrides, so that it goes wherever overrides go: to jobs and sweeps.

    Keys are written as on the command line, ``optimizer.lr: 1e-5``, or one below the other. Nothing of the
    demonstration is taken where a file is given: model and data are the file's or those of ``others``.

    Args:
        word: the path of the file.
        others: the overrides of the command line, which count before the file's.
        config_dir: a folder with the user's own groups.

    Raises:
        UserError: there is no such file, it is no YAML, or a key or value in it is wrong.
    """
    path = local_path(word)
    if not path.is_file():
        near = nearest_path(path) if word.endswith(SUFFIXES) else ""
        raise UserError(f"{word}: must be KEY=VALUE, or a YAML file that exists{near or of_a_directory(word)}")
    content = _read(path, word)
    if "defaults" in content:
        raise UserError(f"{word}: defaults: a preset is chosen by its group's name, as in method: lora, without a list")
    values: dict[str, Any] = {}
    for key, value in _flat(content, Config):
        if key in values:
            raise UserError(
                f"{word}: {key} is set twice, to {as_written(values[key])} and {as_written(value)}; keep one"
            )
        values[key] = value
    for key, value in values.items():
        if key in PATH_KEYS and isinstance(value, list | dict) and key != "generate.prompts":
            raise UserError(f"{word}: {key}={as_written(value)}: must be one path, not a list or a mapping")
    try:
        overrides = [write_override(key, value) for key, value in values.items()]
        load(["model=custom", *overrides], config_dir)
    except UserError as error:
        raise UserError(f"{word}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{word}: an anchor (&NAME) holds itself (*NAME); leave that out") from None
    chosen = {text.lstrip("+").partition("=")[0] for text in [*overrides, *others]}  # of a sweep with several values
    needed = [group for group in ("model", "data") if not {group, "experiment"} & chosen]
    return [*(f"{group}=custom" for group in needed), *overrides]


def _read(path: Path, word: str) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            found = yaml.load(file, _Loader)  # a safe one
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{in_one_line(error.problem_mark)}: cannot be read as YAML, {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{word}: cannot be read as YAML ({in_one_line(error)})") from None
    if not isinstance(found, dict | None):
        raise UserError(f"{word}: must hold keys and values, such as train.epochs: 3")
    return {str(key): value for key, value in (found or {}).items()}


def _flat(content: Mapping[str, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key with its value; what stands below a group of keys is a key, a free mapping is a value.

    The name of a sampler, an update or an optimizer chooses it, as the group does.
    """
    parts = {
        field.name: type(field.default_factory())
        for field in dataclasses.fields(schema)
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory())
    }
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key.removesuffix(".name") in SCHEMAS:
            key = key.removesuffix(".name")
        if isinstance(value, Mapping) and name in parts:
            yield from _flat(value, parts[name], f"{key}.")
        elif value is not None or name not in parts:  # else a heading without keys
            yield key, value
