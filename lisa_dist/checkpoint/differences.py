"""What differs between the run that wrote a checkpoint and the one that resumes from it: refused by name, or logged."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lisa_dist.checkpoint.manifest import CONFIG
from lisa_dist.config import UserError

Settings = dict[str, Any]  # dotted key -> value

OF_OTHER_COMMANDS = ("launch.", "export.", "evaluate.", "generate.", "plan.", "bench.", "sweep.")
# Keys without an influence on training: where the run is, that it resumes, and what other commands do.
NOT_OF_TRAINING = ("run.dir", "checkpoint.resume", "checkpoint.new_data", *OF_OTHER_COMMANDS)
# Keys that can make a part of the data another, by part.
BEHIND = {
    "rows": ("data.",),
    "tokenizer": ("model.tokenizer", "model.path"),
    "template": ("model.tokenizer", "model.path"),
}
NOT_OF_ROWS = (
    "data.name",
    "data.preview",
    "data.cache_dir",
    "data.sequence_length",
    "data.packing",
    "data.group_by_length",
)
# What a key that may differ does, and does not, to a run that is resumed.
NOTES = {
    "train.seed": "the order of the data keeps the seed that the run began with",
    "sampler.seed": "the sampler goes on from its state, so this seed has no effect",
    "sampler.threshold": "outliers were measured before the first period and are not again, so this has no effect",
    "model.init": "weights come from the checkpoint, so this has no effect",
    "model.path": "weights come from the checkpoint, not from there",
}


def settings_of(config_yaml: str) -> Settings:
    """Return the settings of a config.yaml by dotted key, those left out that say nothing of training."""
    found = dict(_flatten(yaml.safe_load(config_yaml) or {}))
    return {key: value for key, value in found.items() if not key.startswith(NOT_OF_TRAINING)}


def changed_settings(checkpoint: Path, config_yaml: str) -> list[tuple[str, str, str]]:
    """Return key, value then and value now where ``config_yaml`` differs from the checkpoint's configuration."""
    then, now = settings_of((checkpoint / CONFIG).read_text()), settings_of(config_yaml)
    keys = dict.fromkeys([*now, *then])
    return [(key, _shown(then, key), _shown(now, key)) for key in keys if then.get(key) != now.get(key)]


def table_of(changes: list[tuple[str, str, str]]) -> str:
    """Return a table of key, then, now, and what of it has no effect."""
    table = Table(title="the configuration differs from the checkpoint's; the run goes on", title_justify="left")
    for heading in ("key", "then", "now"):
        table.add_column(heading, overflow="fold")
    for row in changes:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=110, markup=False).print(table)
    notes = [f"{key}: {NOTES[key]}\n" for key, _, _ in changes if key in NOTES]
    return text.getvalue() + "".join(notes)


def changed_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the parts of the data's fingerprint that differ.

    Rows are compared as tokens, so they are named only where nothing else made them others.
    """
    different = [part for part in now if then.get(part, False) != now[part]]  # False: off before there was a key
    if "rows" not in different:
        different = [part for part in different if part != "date"]  # a day that no row shows
    others = [part for part in different if part not in ("rows", "packing", "group_by_length")]
    return [part for part in different if part != "rows" or not others]


def refuse_other_data(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any], config_yaml: str) -> None:
    """Raise :class:`UserError` that names what of the data differs; see :func:`changed_data`."""
    changes = changed_settings(checkpoint, config_yaml)
    told = "; ".join(_told(part, then, now, changes) for part in changed_data(then, now))
    raise UserError(
        f"checkpoint.resume=auto: {checkpoint} was trained on other data: {told}; go on with the data it was trained "
        "on, or set checkpoint.new_data=true, which begins at the start of the new data"
    )


def refuse_other_moments(checkpoint: Path, config_yaml: str) -> None:
    """Raise :class:`UserError` that names the settings by which the optimizer holds other state than it did."""
    of_optimizer = ("update.", "optimizer.", "sampler.", "precision.")
    changes = [change for change in changed_settings(checkpoint, config_yaml) if change[0].startswith(of_optimizer)]
    told = ", ".join(f"{key}={then} then, {now} now" for key, then, now in changes)
    raise UserError(
        f"checkpoint.resume=auto: {checkpoint} holds optimizer state of other tensors than this run's"
        f"{f' ({told})' if told else ''}; resume with the configuration it was written by or choose another run.dir"
    )


def _told(part: str, then: Mapping[str, Any], now: Mapping[str, Any], changes: list[tuple[str, str, str]]) -> str:
    if part not in BEHIND:
        return f"data.{part}={_text(then.get(part))} then, {_text(now[part])} now"
    causes = [
        f"{key}={before} then, {after} now"
        for key, before, after in changes
        if key.startswith(BEHIND[part]) and not key.startswith(NOT_OF_ROWS)
    ]
    name = {"rows": "the rows differ", "tokenizer": "another tokenizer", "template": "another chat template"}[part]
    return f"{name} ({', '.join(causes)})" if causes else name


def _flatten(value: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, dict) and item:
            found += _flatten(item, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", item))
    return found


def _shown(settings: Settings, key: str) -> str:
    return _text(settings[key]) if key in settings else "-"


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
