"""The pictures and the table of results are those that their scripts make, from the tables and rows in the docs."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parents[2] / "docs"


def test_pictures_are_up_to_date_and_shown() -> None:
    pages = "".join((DOCS / name).read_text() for name in ("concepts.md", "results.md"))
    for name, draw in runpy.run_path(str(DOCS / "concepts_pictures.py"))["PICTURES"].items():
        drawn = (DOCS / f"concepts_{name}.svg").read_text()
        assert drawn == draw(), "run python docs/concepts_pictures.py"
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert f"](concepts_{name}.svg)" in pages


def test_the_tables_of_results_are_those_of_the_raw_numbers() -> None:
    script = runpy.run_path(str(DOCS / "results_table.py"))
    page = (DOCS / "results.md").read_text()
    assert script["table"]() in page and script["rates"]() in page
    assert script["table"]() in (DOCS.parent / "README.md").read_text()
