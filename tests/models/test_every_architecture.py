"""Every causal architecture of transformers builds or is refused in a sentence, and packs as the docs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.every_architecture import architectures, examine, table

PAGE = Path(__file__).parents[2] / "docs" / "packing.md"


@pytest.mark.soak
def test_every_architecture_is_what_the_docs_say() -> None:
    outcomes = [examine(name, fields) for name, fields in architectures()]  # anything but a UserError is raised
    assert len(outcomes) > 170
    for outcome in outcomes:
        assert "\n" not in outcome.reason, outcome
        assert outcome.causal is not False, outcome
        assert outcome.loss_error is None or outcome.loss_error < 1e-4, outcome
    assert sum(outcome.loss_error is not None for outcome in outcomes) > 130
    assert table(outcomes) in PAGE.read_text(), "python -m tests.support.every_architecture prints the table"
