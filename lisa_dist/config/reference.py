"""Lists every key with its default and meaning, read from the dataclasses themselves: for ``--help`` and the docs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator

from lisa_dist.config import Config
from lisa_dist.config.overrides import SCHEMAS


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration, as the user writes it."""

    name: str
    default: str
    meaning: str  # the comment beside the field, empty where the name says it all


def keys_of(group: str) -> list[Key]:
    """Return the keys of one group; a sampler's or an update's own keys follow those that all of them share."""
    keys = list(_keys(getattr(Config(), group), f"{group}."))
    shared = {key.name for key in keys}
    for name, schema in SCHEMAS.get(group, {}).items():
        own = [key for key in _keys(schema(), f"{group}.") if key.name not in shared]
        keys += [dataclasses.replace(key, meaning=f"{group}={name}: {key.meaning}".rstrip(": ")) for key in own]
    return keys


def _keys(part: object, prefix: str) -> Iterator[Key]:
    assert dataclasses.is_dataclass(part)
    comments = _comments(type(part))
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        else:
            meaning = field.metadata.get("meaning", comments.get(field.name, ""))
            yield Key(prefix + field.name, _as_written(value), meaning)


def _comments(part: type) -> dict[str, str]:
    """Return the comment beside each field of a dataclass and of the dataclasses that it extends."""
    comments = _comments(part.__mro__[1]) if dataclasses.is_dataclass(part.__mro__[1]) else {}
    source = textwrap.dedent(inspect.getsource(part))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :]
            if "#" in last:
                comments[node.target.id] = last.rpartition("# ")[2].strip()
    return comments


def _as_written(value: object) -> str:
    """Return a default the way a user would write it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_as_written(item) for item in value)}]"
    return str(value)
