"""The site of the docs builds without a warning, and its pages fetch nothing from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet: not strict
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site_and_in_its_menu(site: Path) -> None:
    menu = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").exists()
        assert f'href="{page.stem}.html"' in menu or page.stem == "index"


def test_the_page_of_modules_is_made_from_their_docstrings(site: Path) -> None:
    page = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    assert "RankSynchronizedSampler" in page and "Which options go together" in page


def test_pages_fetch_nothing_from_another_host(site: Path) -> None:
    for page in site.glob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?([^\"' >]+)", page.read_text())
        assert fetched
        assert [address for address in fetched if "//" in address] == []
