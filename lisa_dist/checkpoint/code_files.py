"""The Python files that come with a model: those that ``auto_map`` names, and what they import beside them."""

from __future__ import annotations

import ast
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

GENERATE = "custom_generate/generate.py"  # a loop of generation that comes with a model; auto_map does not name it

Find = Callable[[str], Path | None]  # a file's name within the model -> where it is, None where it is not


def copy_code(find: Find, fields: dict[str, Any], folder: Path, *names: str) -> None:
    """Copy the code that ``auto_map`` of a configuration names, and ``names``, to ``folder``.

    A class whose file is not there is taken out of ``auto_map``; one that is in another repository stays there.
    Both are logged.

    Args:
        find: where the model's files are.
        fields: of config.json or tokenizer_config.json; changed in place.
        folder: where to copy, under the same names.
        names: further files, where they are there.
    """
    auto_map = fields.get("auto_map")
    files: dict[str, Path] = {}
    for auto_class, references in list(auto_map.items()) if isinstance(auto_map, dict) else []:
        for reference in [references] if isinstance(references, str) else references or []:
            _take(find, files, fields, auto_class, reference)
    for name in names:
        files |= needed_files(find, name)
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def needed_files(find: Find, name: str) -> dict[str, Path]:
    """Return a Python file and all that it imports relatively, and these in turn, by name; empty where it is absent."""
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        outside = PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        file = None if outside or name in found else find(name)
        if file is not None:
            found[name] = file
            waiting += _imported(name, file.read_text(encoding="utf-8"))
    return found


def _take(find: Find, files: dict[str, Path], fields: dict[str, Any], auto_class: str, reference: str | None) -> None:
    if not reference:
        return
    if "--" in reference:
        logger.warning("auto_map: %s is loaded from %s, and so it will be from an export", auto_class, reference)
        return
    needed = needed_files(find, f"{reference.rpartition('.')[0]}.py")
    files |= needed
    if not needed:
        fields["auto_map"].pop(auto_class, None)
        logger.warning("auto_map: the file of %s=%s is not there, so an export leaves it out", auto_class, reference)


def _imported(name: str, code: str) -> Iterator[str]:
    """Yield the names of the files that relative imports may mean: modules, packages, and modules of packages."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # such a file can't be run here, and what it would import can't be known
        return
    here = PurePosixPath(name).parent
    yield str(here / "__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here
            for _ in range(node.level - 1):
                base = base.parent
            module = base.joinpath(*(node.module or "").split("."))
            for path in (module, *(module / alias.name for alias in node.names)):
                yield from (f"{path}.py", str(path / "__init__.py"))
