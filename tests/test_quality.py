"""Habits: the docs' links, commands, imports and scripts lead somewhere, every key is read, tests share by support."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lisa_dist import cli
from lisa_dist.commands.table import COMMANDS
from lisa_dist.config import Config
from lisa_dist.config.config_file import names_config_file
from lisa_dist.config.loading import load
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS
from lisa_dist.config.running import WandbConfig
from lisa_dist.config.sampling import SAMPLER_CONFIGS
from lisa_dist.config.sweeps import combinations, read_space
from lisa_dist.config.updates import UPDATE_CONFIGS
from tests.support.docs_pages import PAGES, commands_of, filled_in

ROOT = Path(__file__).parents[1]


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if "://" in target:
                continue
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name} links to {target}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_docs_composes(page: Path, tmp_path: Path) -> None:
    """A key that is renamed, or a preset that goes, is found in the docs too."""
    for command in {tuple(words) for words in commands_of(page, tmp_path)}:
        words = [filled_in(word) for word in command if "..." not in word and not word.startswith("key=")]
        arguments, _ = cli._parse(words)
        name, *overrides = arguments.words
        assert name in COMMANDS, command
        if name == "launch":
            assert overrides.pop(0) == "slurm"
        overrides = [word for word in overrides if not names_config_file(word)]  # the reader's own
        load(combinations(read_space(overrides))[-1] if arguments.multirun else overrides)


def test_what_the_docs_import_is_there() -> None:
    snippets = [text for page in PAGES for text in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert snippets
    for text in [*snippets, *(script.read_text() for script in (ROOT / "docs").glob("*.py"))]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lisa_dist"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.soak
def test_the_table_of_optimizer_state_is_what_its_script_prints() -> None:
    """Half a minute of computing."""
    script = [sys.executable, "docs/optimizer_state_growth.py"]
    printed = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    sizes = {int(period): (round(float(naive)), round(float(own))) for period, naive, own in rows}
    page = (ROOT / "docs" / "memory.md").read_text()
    table = [
        [int(cell) for cell in cells.split("|")]
        for cells in re.findall(r"^\| (?:period|a callback[^|]*|lisa_dist) \| ([\d |]+) \|$", page, re.MULTILINE)
    ]
    assert dict(zip(table[0], zip(*table[1:]))) == {period: sizes[period] for period in table[0]}


def test_every_target_of_make_that_the_docs_name_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, f"{page.name} names {named - targets}"


def test_every_file_that_the_docs_and_the_makefile_name_exists() -> None:
    for page in [*PAGES, ROOT / "Makefile"]:
        named = set(re.findall(r"(?<![\w/.-])(?:tests|lisa_dist|conf)/[\w/]+(?:\.\w+)?", page.read_text()))
        missing = {name for name in named if "NAME" not in name and not (ROOT / name).exists()}
        assert not missing, f"{page.name} names {missing}"


def test_hooks_before_a_commit_run_the_tools_of_the_environment() -> None:
    """The same versions as the tests, and no host to fetch a hook from."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
        assert Path(sys.executable).with_name(hook["entry"].split()[0].rpartition("/")[2]).exists()


# Keys that are read in a way that no tool follows, and the text that reads them.
READ_OTHERWISE = {
    "CheckpointConfig.async": 'getattr(self, "async")',  # a keyword of Python
    "LaunchConfig.partition": 'for key in ("partition", "account")',
    "LaunchConfig.account": 'for key in ("partition", "account")',
    "DataConfig.name": "for records",
}


def test_every_key_is_read_somewhere(tmp_path: Path) -> None:
    """A key that only its dataclass knows would be an option without effect. By types, as mypy finds them."""
    reads = tmp_path / "reads"
    plugin = Path(__file__).with_name("keys_read.py")
    settings = f"[mypy]\npackages = lisa_dist\nplugins = {plugin}\nfollow_imports = skip\ncheck_untyped_defs = True\n"
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "KEYS_READ": str(reads)}, capture_output=True)
    found = set(reads.read_text().splitlines())
    code = "\n".join(file.read_text() for file in (ROOT / "lisa_dist").rglob("*.py"))
    unread = {
        f"{schema.__name__}.{field.name}"
        for schema in schemas()
        for field in dataclasses.fields(schema)
        if not {f"{owner.__name__}.{field.name}" for owner in schema.__mro__} & found
    }
    assert unread == {key for key, reading in READ_OTHERWISE.items() if reading in code}


def schemas() -> set[type[Any]]:
    """The dataclass of every group, and of every sampler, update and optimizer."""
    groups = [type(getattr(Config(), field.name)) for field in dataclasses.fields(Config) if field.name != "method"]
    return {*groups, WandbConfig, *SAMPLER_CONFIGS.values(), *UPDATE_CONFIGS.values(), *OPTIMIZER_CONFIGS.values()}


def test_every_folder_says_what_lives_there_and_what_may_not() -> None:
    """A folder without an ``__init__`` is passed over by the contract on imports too."""
    for folder in {file.parent for file in (ROOT / "lisa_dist").rglob("*.py")} - {ROOT / "lisa_dist"}:
        start = folder / "__init__.py"
        said = (ast.get_docstring(ast.parse(start.read_text())) or "") if start.exists() else ""
        assert "\n\n" in said and said.count(".") >= 2, f"{folder} does not say what it is for, and what is not"


def test_what_tests_share_lies_in_support() -> None:
    shared = re.compile(
        r"^from tests(?:\.\w+)*\.test_\w+ import|^from tests\.(?!support|mutations|golden|gpu)", re.MULTILINE
    )
    assert [str(file) for file in (ROOT / "tests").rglob("*.py") if shared.search(file.read_text())] == []
