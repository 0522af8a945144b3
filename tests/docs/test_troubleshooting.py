"""Every message that the page on troubleshooting quotes still stands in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MESSAGES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every text of the source, ``...`` for what is put into it when it is said."""
    scripts = [file.read_text() for file in (ROOT / "launch").rglob("*.sh")]
    modules = [ast.parse(file.read_text()) for file in (ROOT / "lisa_dist").rglob("*.py")]
    found = [text for module in modules for node in ast.walk(module) for text in text_of(node)]
    return [*found, *(re.sub(r"\$?\{[^{}]*\}|\$\w+", "...", script) for script in scripts)]


def text_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[\d.]*[sdf]", "...", node.value)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_page_is_one_of_the_source(message: str, texts: list[str]) -> None:
    assert any(message in text for text in texts)


def test_the_page_quotes_messages() -> None:
    assert len(MESSAGES) > 25 and len(set(MESSAGES)) == len(MESSAGES)
