"""The habits that tools can check: style, types, the import contract, links of the docs, keys that nobody reads."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.config import Config
from lisa_dist.config.method import SAMPLER_CONFIGS, UPDATE_CONFIGS
from lisa_dist.config.running import WandbConfig

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


# Keys that are read in a way that no tool follows, and the text that reads them.
READ_OTHERWISE = {
    "CheckpointConfig.async": 'getattr(self, "async")',  # a keyword of Python
    "LaunchConfig.partition": 'for key in ("partition", "account")',
    "LaunchConfig.account": 'for key in ("partition", "account")',
    "GradientSamplerConfig.probe_batches": "settings.probe_batches",
    "OutlierSamplerConfig.probe_batches": "settings.probe_batches",
    "OutlierSamplerConfig.threshold": "settings.threshold",
    "ImportanceSamplerConfig.probe_batches": "settings.probe_batches",
    "ImportanceSamplerConfig.suppression_factor": "settings.suppression_factor",
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
    """The dataclass of every group, and of every sampler and update."""
    groups = [type(getattr(Config(), field.name)) for field in dataclasses.fields(Config) if field.name != "method"]
    return {*groups, WandbConfig, *SAMPLER_CONFIGS.values(), *UPDATE_CONFIGS.values()}
