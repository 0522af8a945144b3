"""The page of what goes with what is made by the checks themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from lisa_dist.config.combinations import KEYS, RANKS, Option, judge, page


def test_the_page_of_the_docs_is_up_to_date() -> None:
    written = (Path(__file__).parents[2] / "docs" / "combinations.md").read_text()
    assert written == page(), "run python -m lisa_dist.config.combinations > docs/combinations.md"


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ({"update": "low_rank"}, {"optimizer.in_backward": True}, "refused"),
        ({"update": "full_rank"}, {"model.quantization": "nf4"}, "refused"),
        ({"update": "lora"}, {"model.quantization": "nf4"}, ""),
        ({"sampler": "fixed"}, {"optimizer.state_on_freeze": "offload"}, "no effect"),
        ({"parallel.prefetch": 2}, {"parallel.replicate": RANKS}, "no effect"),
        ({"parallel.offload": "all"}, {"parallel.offload": "frozen"}, ""),
    ],
)
def test_pairs(one: Option, other: Option, verdict: str) -> None:
    judged = judge(one, other)
    assert judged is not None and judged[0] == verdict
    assert bool(judged[1]) == bool(verdict)


def test_a_key_of_another_sampler_is_not_there() -> None:
    assert judge({"sampler": "sweep"}, {"sampler.non_block_modules": True}) is None


def test_options_have_an_effect_and_are_taken_by_themselves() -> None:
    """Else every pair with them would be called refused or without effect."""
    for option in KEYS:
        judged = judge(option, {"data.sequence_length": 256})
        assert judged == ("", ""), option
