"""Reads ``key=value`` overrides in Hydra's grammar and applies them one by one, so that an error names its key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lisa_dist.config.errors import UserError, as_written, nearest
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS
from lisa_dist.config.other_trainers import key_here
from lisa_dist.config.paths import local_path, path_exists
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.config.updates import UPDATE_CONFIGS

# The groups whose dataclass depends on the name that is chosen.
SCHEMAS: dict[str, Mapping[str, type[Any]]] = {
    "sampler": SAMPLER_CONFIGS,
    "update": UPDATE_CONFIGS,
    "optimizer": OPTIMIZER_CONFIGS,
}
TYPE_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text (quote it where it is a number or holds blanks, commas or brackets)",
}

PARSER = OverridesParser.create()


@dataclass(frozen=True)
class KeyOverride:
    """One ``key=value``: the parsed value, and the text as the user wrote it for messages."""

    key: str
    value: Any
    text: str


class Written(str):
    """A number or a truth of a YAML file, in the letters that it has there.

    ``24:00:00`` is 86400 for YAML, and no time for Slurm; ``on`` is true for YAML, and may be a name.
    """


SWITCHES = {"yes": "true", "on": "true", "no": "false", "off": "false"}  # which YAML knows besides, and Hydra does not

# Keys whose value is a path, which is meant as it is written.
PATH_KEYS = (
    *("data.path", "data.validation", "data.preview_file", "data.cache_dir", "model.path", "model.tokenizer"),
    *("run.dir", "sweep.dir", "export.path", "evaluate.path", "evaluate.data", "evaluate.task_dir", "evaluate.output"),
    *(
        "generate.path",
        "generate.prompts",
        "generate.output",
        "plan.gpu",
        "launch.script",
        "launch.container",
        "runs.dir",
    ),
)


def parse_overrides(texts: list[str]) -> list[KeyOverride]:
    """Parse Hydra's override grammar.

    Raises:
        UserError: a text is no ``key=value``, or one of the forms that remove keys, move groups or sweep.
    """
    return [_parse(text) for text in texts]


def write_override(key: str, value: Any) -> str:
    """Return ``key=value`` in Hydra's grammar for a value as YAML knows it: null, numbers, texts, lists, mappings.

    What is :class:`Written` is so on the command line too.
    """
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_entry(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{_entry(item)}' for name, item in value.items())}}}"
    if not isinstance(value, str) or isinstance(value, Written) or re.fullmatch(r"/[\w./+%@:-]*", value):
        return as_written(value)
    # Backslashes count where they stand before a quote.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{escaped}'"


def _entry(value: Any) -> str:
    """Return a value inside a list or a mapping, where no type of a key says that ``on`` is true."""
    return SWITCHES.get(value.lower(), value) if isinstance(value, Written) else _written(value)


def literal_path(text: str) -> KeyOverride | None:
    """Return ``key=path`` as it is written where ``key`` takes a path and ``path`` exists; else None."""
    key, _, path = text.lstrip("+").partition("=")
    path = path.strip()
    means_path = key in PATH_KEYS and path not in ("", "null") and path_exists(local_path(path))
    return KeyOverride(key, path, text) if means_path else None


def _path_override(text: str) -> KeyOverride | None:
    """Return ``key=path`` of a key that takes a path: as it is written, whatever letters the path holds.

    But ``null`` stays null, a path that stands in quotes as a whole loses them, and prompts may be a list.
    """
    key, _, path = text.lstrip("+").partition("=")
    path = path.strip()
    in_quotes = len(path) > 1 and path[0] in "'\"" and path[-1] == path[0]
    is_list = key == "generate.prompts" and path.startswith("[")
    if key not in PATH_KEYS or path in ("", "null") or in_quotes or is_list:
        return literal_path(text)
    return KeyOverride(key, path, text)


def of_a_directory(word: str) -> str:
    """Return how the directory of a run is named where ``word`` is a directory, else an empty string."""
    return f"; the directory of a run is named by run.dir={word}" if local_path(word).is_dir() else ""


def _parse(text: str) -> KeyOverride:
    if (literal := _path_override(text)) is not None:
        return literal
    try:
        override: Override = PARSER.parse_override(text)
    except HydraException:
        if (named := of_a_directory(text)) or "=" not in text:  # the directories of a sweep's jobs have = in them
            raise UserError(f"{text}: must be KEY=VALUE{named}") from None
        raise UserError(
            f"{text}: cannot be read, it must be KEY=VALUE where a value that holds brackets, commas or = "
            "stands in quotes, as in 'run.name=\"a=b\"'"
        ) from None
    key = override.key_or_group
    if override.type == OverrideType.DEL:
        raise UserError(f"{text}: a key cannot be removed, set it to null or to another value")
    if override.package is not None:
        raise UserError(f"{text}: a group cannot be moved to another place, write {key}=NAME")
    if key.split(".")[0] == "hydra":
        raise UserError(f"{text}: Hydra's own keys cannot be set, run.dir says where a run is")
    if override.is_sweep_override():
        raise UserError(f"{text}: several values need --multirun, a list is written {key}=[A,B]")
    if key in PATH_KEYS and override.value() == "":
        raise UserError(f"{text}: is empty, as a variable of the shell is that was never set; give a path, or null")
    # optimizer.name is a key like those beside it, but another optimizer has other keys and defaults: it is the group.
    return KeyOverride("optimizer" if key == "optimizer.name" else key, override.value(), text)


def apply_override(config: DictConfig, override: KeyOverride) -> None:
    """Set one key of ``config``.

    Raises:
        UserError: there is no such key, or the value has the wrong type.
    """
    key_exists, inside_mapping = _locate(config, override.key)
    if not key_exists or (override.text.startswith("+") and not inside_mapping):
        near = of_a_directory(override.text) or _suggestion(config, override.key)
        raise UserError(f"{override.text}: there is no key {override.key}{near}")
    # Keys of a free mapping (data.columns, model.architecture) may be new; every other key exists already.
    node = None if inside_mapping else node_of(config, override.key)
    if isinstance(node, DictConfig) and not _is_mapping(node):
        raise UserError(
            f"{override.text}: {override.key} is a group of keys, set one of them, for example "
            f"{override.key}.{next(iter(node))!s}=VALUE"
        )
    try:
        may_add = inside_mapping or isinstance(node, DictConfig)
        OmegaConf.update(config, override.key, _value_for(node, override), force_add=may_add)
    except (OmegaConfBaseException, ValueError, TypeError):
        raise UserError(f"{override.text}: must be {describe_type(node)}") from None


def node_of(config: DictConfig, key: str) -> Any:
    """Return the node of a key that exists, which knows its type."""
    parent, _, name = key.rpartition(".")
    return (OmegaConf.select(config, parent) if parent else config)._get_node(name)


def _locate(config: DictConfig, key: str) -> tuple[bool, bool]:
    """Return whether ``key`` exists, and whether it is inside a free mapping, where any name is a key."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False, False
        if _is_mapping(node):
            return True, True
        if part not in node:
            return False, False
        node = node._get_node(part)
    return True, False


def _is_mapping(node: DictConfig) -> bool:
    return not OmegaConf.is_missing(node, "") and OmegaConf.get_type(node) in (dict, None)


def _value_for(node: Node | None, override: KeyOverride) -> Any:
    """Return the value for a key; the text as written where the key holds a text: ``run.name=1e3`` is not 1000.0.

    Raises:
        TypeError: OmegaConf would take the value, and it is none of the key's type.
    """
    value, metadata = override.value, None if node is None else node._metadata
    wanted, of_entries = getattr(metadata, "ref_type", None), getattr(metadata, "element_type", None)
    if wanted is str and isinstance(value, bool | int | float):
        return override.text.partition("=")[2].strip()
    if wanted is bool and isinstance(value, int) and value not in (0, 1):
        raise TypeError
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(entry, dict | list) and of_entries in TYPE_DESCRIPTIONS:
            raise TypeError
        # 1.10 is read as 1.1 and 2024_01 as 202401, and how an entry was written isn't known.
        is_whole = isinstance(entry, int) and str(entry) in override.text
        if isinstance(entry, bool | int | float) and of_entries is str and not is_whole:
            raise TypeError
    return value


def describe_type(node: Node | None) -> str:
    """Return in words what the key that ``node`` belongs to may hold."""
    if node is None:
        return "a value"
    or_null = " or null" if node._is_optional() else ""
    entry_type: Any = getattr(node._metadata, "element_type", None)
    of_entries = TYPE_DESCRIPTIONS.get(entry_type, "a value")
    if isinstance(node, ListConfig):
        return f"a list such as [A,B], each entry {of_entries}{or_null}"
    if isinstance(node, DictConfig):
        return f"a mapping such as {{A:B}}, each value {of_entries}{or_null}"
    return TYPE_DESCRIPTIONS.get(node._metadata.ref_type, "a value") + or_null


def all_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that an override may set."""
    for name in config:
        node = config._get_node(name)
        key = f"{prefix}{name!s}"
        if isinstance(node, DictConfig) and not _is_mapping(node):
            yield from all_keys(node, f"{key}.")
        else:
            yield key


def _suggestion(config: DictConfig, key: str) -> str:
    """Return ``; did you mean X?`` or what the group has, for a key that does not exist."""
    keys = list(all_keys(config))
    last = key.rpartition(".")[2]
    same_last = [candidate for candidate in keys if candidate.rpartition(".")[2] == last]
    hint = f"; did you mean {same_last[0]}?" if len(same_last) == 1 else key_here(last) or nearest(key, keys)
    group = key.partition(".")[0]
    siblings = [candidate.partition(".")[2] for candidate in keys if candidate.startswith(f"{group}.")]
    owners = [name for name, schema in SCHEMAS.get(group, {}).items() if last in {own.name for own in fields(schema)}]
    if owners:
        return f", it belongs to {' or '.join(f'{group}={name}' for name in owners)}"
    if "." in key and siblings:
        return f", {group} has {', '.join(siblings)}{hint}"
    groups = [str(name) for name in config]
    return hint if key_here(last) else f", the keys begin with {', '.join(groups)}{hint or nearest(group, groups)}"
