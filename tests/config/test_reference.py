"""Every key is listed with its default and its meaning, straight from the dataclasses."""

from __future__ import annotations

import dataclasses

from omegaconf import OmegaConf

from lisa_dist.config import Config
from lisa_dist.config.overrides import all_keys
from lisa_dist.config.reference import keys_of

GROUPS = [field.name for field in dataclasses.fields(Config) if field.name != "method"]


def test_no_key_is_left_out() -> None:
    listed = {key.name for group in GROUPS for key in keys_of(group)}
    assert {*all_keys(OmegaConf.structured(Config))} - listed == {"method"}


def test_defaults_and_meanings_are_those_of_the_source() -> None:
    keys = {key.name: key for group in GROUPS for key in keys_of(group)}
    assert (keys["sampler.period"].default, keys["sampler.period"].meaning) == (
        "20",
        "K: optimizer steps between two draws",
    )
    assert keys["optimizer.betas"].default == "[0.9,0.999]"
    assert keys["train.max_steps"].default == "null"
    assert keys["sampler.blocks"].meaning.startswith("sampler=fixed: ")
    assert keys["checkpoint.async"].meaning
    assert keys["logger.wandb.mode"].meaning == "online, offline"
