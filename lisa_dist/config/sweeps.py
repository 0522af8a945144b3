"""From the overrides of a sweep, ``key=A,B``, to those of each of its jobs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from lisa_dist.config.errors import UserError
from lisa_dist.config.loading import GROUPS, group_choices
from lisa_dist.config.overrides import parse_overrides


@dataclass(frozen=True)
class SweptOverrides:
    """The overrides of one job, and those among them that differ between the jobs."""

    overrides: list[str]
    varied: list[str]


def split_sweep(texts: list[str], config_dir: str | None = None) -> list[SweptOverrides]:
    """Return every combination of the values: ``key=A,B``, ``choice(A,B)``, ``range(1,4)``; of names, ``glob(*)``.

    The last key varies fastest; the last of two overrides of the same key counts. A fixed override stays as it is
    written, a varied value is written in Hydra's way (``1e-5`` becomes ``1e-05``).

    Args:
        texts: the overrides of the sweep.
        config_dir: a folder with the user's own groups, for ``glob``.

    Raises:
        UserError: an override cannot be read, or it names values that cannot be enumerated.
    """
    choices: dict[str, list[str]] = {}
    for text in texts:
        key, values = _values(text, config_dir)
        choices[key] = values
    return [
        SweptOverrides(list(job), [text for text, values in zip(job, choices.values()) if len(values) > 1])
        for job in itertools.product(*choices.values())
    ]


def _values(text: str, config_dir: str | None) -> tuple[str, list[str]]:
    """Return the key of an override and its text for every value."""
    try:
        override: Override = OverridesParser.create().parse_override(text)
        if not override.is_sweep_override():
            return parse_overrides([text])[0].key, [text]
        key, value = override.get_key_element(), override.value()
        if isinstance(value, Glob):
            names = value.filter(group_choices(key, config_dir)) if key in GROUPS else []
            values = [str(name) for name in names]
        else:
            values = list(override.sweep_string_iterator())
    except HydraException:
        raise UserError(
            f"{text}: cannot be read as one value or several, write them as in {text.partition('=')[0]}=A,B "
            "or =range(1,4), in quotes what holds brackets or ="
        ) from None
    if not values:
        raise UserError(f"{text}: gives no value; glob(...) is for the names of a group")
    return key, [f"{key}={value}" for value in values]
