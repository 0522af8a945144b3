"""The pictures and tables are those that their scripts make, from the tables and rows in the docs."""

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


def test_the_table_of_what_fits_is_that_of_its_script() -> None:
    """Of its plans only one is made anew, as all take minutes."""
    script = runpy.run_path(str(DOCS / "what_fits.py"))
    cards, models = script["CARDS"], script["MODELS"]
    page = (DOCS / "memory.md").read_text()
    for rung, settings in script["LADDER"].items():
        assert f"\n| **{rung}** | `{' '.join(settings)}` |" in page
    section = page.partition("\n## What one card can train\n")[2].partition("\n## ")[0]
    wide = [line.strip("| ").split(" | ") for line in section.splitlines() if line.count("|") == len(models) + 2]
    assert wide[0] == ["card", *(f"`{model}`" for model in models)]
    cells = {row[0].strip("`"): dict(zip(models, row[1:])) for row in wide[2:]}
    assert list(cells) == cards
    assert cells["h200_141gb"]["llama3_1_8b"] == script["cell_of"]("llama3_1_8b", "h200_141gb")
