"""Configurations of other trainers beside those of lisa_dist: ours are read and checked, and say what theirs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lisa_dist.config.checks import check_combinations, check_global_batch
from lisa_dist.config.config_file import file_overrides
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.loading import load
from lisa_dist.config.other_trainers import KEYS_HERE

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
SECTIONS = {text.partition("\n")[0]: text for text in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
WORDS = {"python": r"^ +(\w+)=", "yaml": r"^(\w+):", "bash": r"--(\w+)"}  # of their configurations, by language


@pytest.mark.parametrize("trainer", SECTIONS)
def test_our_configuration_is_complete_and_says_what_theirs_says(trainer: str, tmp_path: Path) -> None:
    section = SECTIONS[trainer]
    (language, theirs), (_, ours) = re.findall(r'^```(\w+) title="[^"]+"\n(.*?)^```', section, re.M | re.S)
    file = tmp_path / "my.yaml"
    file.write_text(ours)
    overrides = file_overrides(str(file), [])
    config = load(overrides)
    check_combinations(config)
    check_global_batch(config.train, ranks=8)
    idle = options_without_effect(config, ranks=8, has_validation=config.data.validation is not None)
    assert [sentence for sentence in idle if not sentence.startswith("sampler.active_layers=")] == []
    assert config.model.path and config.data.path and config.run.dir
    for word in re.findall(WORDS[language], theirs, re.MULTILINE):
        key = re.split(r"[=, ]", KEYS_HERE.get(word, ""))[0]
        is_set = key != "" and any(override.startswith((f"{key}=", f"{key}.")) for override in overrides)
        assert is_set or f"`{word}`" in section, f"{word} of {trainer}"
