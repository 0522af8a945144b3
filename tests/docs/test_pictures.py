"""The pictures of the docs are those that their script draws, from the tables of the docs."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_up_to_date_and_shown() -> None:
    page = (DOCS / "concepts.md").read_text()
    for name, draw in runpy.run_path(str(DOCS / "concepts_pictures.py"))["PICTURES"].items():
        drawn = (DOCS / f"concepts_{name}.svg").read_text()
        assert drawn == draw(), "run python docs/concepts_pictures.py"
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert f"](concepts_{name}.svg)" in page
