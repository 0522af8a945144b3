"""The habits that tools can check: style, types, the import contract, links of the docs, keys that nobody reads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lisa_dist.config import Config
from lisa_dist.config.overrides import all_keys

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [sys.executable, "-m", "mypy"],
        [str(Path(sys.executable).with_name("lint-imports"))],
    ],
    ids=["ruff check", "ruff format", "mypy", "import contract"],
)
def test_tools_are_content(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_key_is_read_somewhere() -> None:
    """A key whose name occurs nowhere outside the dataclasses would be an option without effect."""
    package = ROOT / "lisa_dist"
    code = "\n".join(
        file.read_text()
        for file in package.rglob("*.py")
        if file.parent.name != "config" or file.name in ("loading.py", "run_directory.py", "running.py")
    )
    names = {key: key.rpartition(".")[2] for key in all_keys(OmegaConf.structured(Config))}
    unread = [key for key, name in names.items() if not re.search(rf"\.{name}\b|\"{name}\"", code)]
    assert not unread
