"""The tests of the core are tested: each of many errors in it makes one of them fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.__main__ import ROOT, mutated, table, unnoticed
from tests.mutations.mutations import MUTATIONS, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_mutation_fits_the_code_and_names_a_test(mutation: Mutation) -> None:
    """Without running it: what a change of the code makes stale is seen at once."""
    ast.parse(mutated(mutation, (ROOT / "lisa_dist" / mutation.file).read_text()))
    file, _, name = mutation.test.partition("::")
    module = ast.parse((ROOT / "tests" / file).read_text())
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    assert not name or name.partition("[")[0] in functions


def test_the_docs_list_them_all() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30
    assert table() in Path(ROOT / "docs" / "reliability.md").read_text()


@pytest.mark.soak
def test_every_mutation_is_noticed() -> None:
    assert unnoticed(MUTATIONS) == []
