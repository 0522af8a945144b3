"""Every key is listed with its default and its meaning, straight from the dataclasses."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lisa_dist.config import Config
from lisa_dist.config.overrides import all_keys
from lisa_dist.config.reference import keys_of, page

GROUPS = [field.name for field in dataclasses.fields(Config) if field.name != "method"]


def test_no_key_is_left_out() -> None:
    listed = {key.name for group in GROUPS for key in keys_of(group)}
    assert {*all_keys(OmegaConf.structured(Config))} - listed == {"method"}


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_has_a_meaning(group: str) -> None:
    without = [key.name for key in keys_of(group) if re.sub(rf"^{group}=\w+: ", "", key.meaning) == ""]
    assert without == []


def test_defaults_and_meanings_are_those_of_the_source() -> None:
    keys = {key.name: key for group in GROUPS for key in reversed(keys_of(group))}
    assert keys["train.max_steps"].type == "int or null"
    assert (keys["sampler.period"].default, keys["sampler.period"].meaning) == (
        "20",
        "K: optimizer steps between two draws",
    )
    assert keys["optimizer.betas"].default == "[0.9,0.999]"
    assert keys["train.max_steps"].default == "null"
    assert keys["sampler.blocks"].meaning.startswith("sampler=fixed: ")
    assert keys["checkpoint.async"].meaning
    assert keys["logger.wandb.mode"].meaning == "online, offline, disabled; null: WANDB_MODE, else online"


def test_the_page_of_the_docs_is_up_to_date() -> None:
    written = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert written == page(), "run python -m lisa_dist.config.reference > docs/configuration.md"


def test_the_page_names_every_key_and_preset() -> None:
    shown = page()
    assert all(f"| `{key.name}` | " in shown for group in GROUPS for key in keys_of(group))
    assert "### sampler=gradient\n\nGRASS: blocks with large gradients are drawn more often.\n" in shown
    assert "| `sampler=NAME` | all, bandit, " in shown
    assert "runs/\\<run.name or date and time\\>" in shown, "else Markdown takes it for a tag"
