"""From the overrides of a sweep, ``key=A,B`` or ``key=interval(A,B)``, to those of each of its jobs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException

from lisa_dist.config.errors import UserError
from lisa_dist.config.loading import GROUPS, group_choices
from lisa_dist.config.overrides import PARSER, PATH_KEYS, literal_path, parse_overrides


@dataclass(frozen=True)
class Interval:
    """``key=interval(low,high)``: numbers that cannot be enumerated; whole ones where the bounds are ``int``."""

    key: str
    low: float
    high: float
    log: bool  # tag(log,interval(...)): evenly over the orders of magnitude

    def override(self, value: float) -> str:
        """Return ``key=value``, a fraction with four digits."""
        return f"{self.key}={value if isinstance(value, int) else float(f'{value:.4g}')!r}"


Space = dict[str, list[str] | Interval]  # of each key: its override for every value, or an interval


def read_space(texts: list[str], config_dir: str | None = None) -> Space:
    """Return the values of every key: ``A,B``, ``choice(A,B)``, ``range(1,4)``; of names, ``glob(*)``; or an interval.

    The last of two overrides of the same key counts. A fixed override stays as it is written, a varied value is
    written in Hydra's way (``1e-5`` becomes ``1e-05``).

    Args:
        texts: the overrides of the sweep.
        config_dir: a folder with the user's own groups, for ``glob``.

    Raises:
        UserError: an override cannot be read.
    """
    return dict(_values(text, config_dir) for text in texts)


def combinations(space: Space) -> list[list[str]]:
    """Return those of :func:`each_combination`, which are many where several keys have many values."""
    return list(each_combination(space))


def each_combination(space: Space) -> Iterator[list[str]]:
    """Yield the overrides of a job for every combination of the values, of an interval its two ends.

    The last key varies fastest.
    """
    choices = [
        [values.override(values.low), values.override(values.high)] if isinstance(values, Interval) else values
        for values in space.values()
    ]
    yield from map(list, itertools.product(*choices))


def varies(values: list[str] | Interval) -> bool:
    """Whether a key's values differ between jobs."""
    return isinstance(values, Interval) or len(values) > 1


def _values(text: str, config_dir: str | None) -> tuple[str, list[str] | Interval]:
    """Return the key of an override and its text for every value, or its interval."""
    key = text.lstrip("+").partition("=")[0]
    try:
        override: Override = PARSER.parse_override(text)
        if literal_path(text) is not None or not override.is_sweep_override():
            return parse_overrides([text])[0].key, [text]
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            return key, _interval(text, key, value)
        if isinstance(value, Glob):
            names = value.filter(group_choices(key, config_dir)) if key in GROUPS else []
            values = [str(name) for name in names]
        else:
            values = list(override.sweep_string_iterator())
            if key in PATH_KEYS:  # meant as they are written, and Hydra escapes blanks and colons
                paths = [PARSER.parse_override(f"{key}={value}").value() for value in values]
                values = [path if isinstance(path, str) else value for path, value in zip(paths, values)]
    except HydraException:
        if key in PATH_KEYS:
            return parse_overrides([text])[0].key, [text]
        raise UserError(
            f"{text}: cannot be read as one value or several, write them as in {key}=A,B "
            "or =range(1,4), in quotes what holds brackets or ="
        ) from None
    if not values:
        raise UserError(f"{text}: gives no value; glob(...) is for the names of a group")
    if len(set(values)) < len(values):
        twice = max(values, key=values.count)
        raise UserError(f"{text}: gives {twice} more than once, so that jobs would be the same; give it once")
    return key, [f"{key}={value}" for value in values]


def _interval(text: str, key: str, sweep: IntervalSweep) -> Interval:
    if sweep.start is None or sweep.end is None or not sweep.start < sweep.end:
        raise UserError(f"{text}: must be interval(LOW,HIGH), the lower end first")
    if not sweep.tags <= {"log"} or ("log" in sweep.tags and sweep.start <= 0):
        raise UserError(f"{text}: the only tag is log, as in tag(log,interval(1e-5,1e-3)), and needs ends above 0")
    return Interval(key, sweep.start, sweep.end, "log" in sweep.tags)
