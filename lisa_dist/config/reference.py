"""Lists every key with its default and meaning, read from the dataclasses themselves: for ``--help`` and the docs.

``python -m lisa_dist.config.reference > docs/configuration.md`` writes the page of the docs anew.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from lisa_dist.config import Config
from lisa_dist.config.errors import as_written
from lisa_dist.config.loading import GROUPS, group_choices
from lisa_dist.config.overrides import SCHEMAS

INTRODUCTION = """# Configuration

Every key with its type, its default and its meaning. This page is written by
`python -m lisa_dist.config.reference > docs/configuration.md` from the dataclasses in `lisa_dist/config`: change those
and run the command again. `lisa-dist COMMAND --help` shows the same keys in the terminal.

A key is set as `KEY=VALUE`, a preset is chosen as `GROUP=NAME`. The defaults below are those of the dataclasses;
a preset may set others, and `lisa-dist train --cfg job` prints what is in effect. A key that does not exist is refused.

## Presets
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration, as the user writes it."""

    name: str
    type: str  # as in Python, with null for None
    default: str
    meaning: str  # the comment beside the field


def keys_of(group: str) -> list[Key]:
    """Return the keys of one group; a sampler's or an update's own keys follow those that all of them share."""
    keys = _shared_keys(group)
    for name in SCHEMAS.get(group, {}):
        own = _own_keys(group, name)
        keys += [dataclasses.replace(key, meaning=f"{group}={name}: {key.meaning}") for key in own]
    return keys


def page() -> str:
    """Return docs/configuration.md: every preset, and every key with its type, default and meaning."""
    presets = [[f"`{group}=NAME`", ", ".join(group_choices(group))] for group in GROUPS]
    lines = [INTRODUCTION, *_table(["group", "presets"], presets)]
    for field in dataclasses.fields(Config):
        if not dataclasses.is_dataclass(getattr(Config(), field.name)):
            continue
        lines += ["", f"## {field.name}", "", *_key_table(_shared_keys(field.name))]
        for name, schema in SCHEMAS.get(field.name, {}).items():
            own = _own_keys(field.name, name)
            lines += ["", f"### {field.name}={name}", "", _escaped(inspect.getdoc(schema) or "")]
            lines += ["", *_key_table(own)] if own else []
    return "\n".join(lines) + "\n"


def _shared_keys(group: str) -> list[Key]:
    """Return the keys of a group; of one with a dataclass for each name, those that all of them have."""
    keys = list(keys_in(getattr(Config(), group), f"{group}."))
    others = [{key.name for key in keys_in(schema(), f"{group}.")} for schema in SCHEMAS.get(group, {}).values()]
    return [key for key in keys if all(key.name in names for names in others)]


def _own_keys(group: str, name: str) -> list[Key]:
    """Return the keys that not all of a group have, or whose default or meaning is another."""
    shared = _shared_keys(group)
    keys = keys_in(SCHEMAS[group][name](), f"{group}.")
    return [key for key in keys if key not in shared and key.name != f"{group}.name"]


def keys_in(part: object, prefix: str) -> Iterator[Key]:
    """Yield the keys of a dataclass and of those inside it; the default is the value that ``part`` has."""
    assert dataclasses.is_dataclass(part)
    kind: Any = type(part)
    comments = _comments(kind)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys_in(value, f"{prefix}{field.name}.")
        else:
            meaning = field.metadata.get("meaning", comments.get(field.name, ""))
            type_name = str(field.type).replace(" | None", " or null")
            yield Key(prefix + field.name, type_name, as_written(value), meaning)


@functools.cache  # Python parses a class' whole file to find its source
def _comments(part: type) -> Mapping[str, str]:
    """Return the comment beside each field of a dataclass and of the dataclasses that it extends."""
    comments = {**_comments(part.__mro__[1])} if dataclasses.is_dataclass(part.__mro__[1]) else {}
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


def _key_table(keys: list[Key]) -> list[str]:
    rows = [[f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", key.meaning] for key in keys]
    return _table(["key", "type", "default", "meaning"], rows)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _escaped(text: str) -> str:
    """Return ``text`` for Markdown: what stands in backquotes as it is, else nothing of it a tag, emphasis or cell."""
    return text if text.startswith("`") else re.sub(r"([<>*|~])", r"\\\1", text)


if __name__ == "__main__":
    print(page(), end="")
