"""Errors that a user can fix: one sentence on stderr and no traceback, exit code 2 where nothing has run yet."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # stopped on a signal after a saved checkpoint, to be requeued
EXIT_INTERRUPTED = 130  # interrupted where there is nothing to save


class UserError(Exception):
    """A mistake in the configuration or the input; its message is one clear sentence."""


class ResourceError(Exception):
    """The machine has not, or no longer, what a run needs; the message is one clear sentence, the exit code 1."""


class OutOfMemoryError(ResourceError):
    """Memory ran out; the message says where and what needs less."""


class StorageError(ResourceError):
    """Files can't be written any more; the message says where and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the valid name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def in_one_line(error: object) -> str:
    """Return what an exception of a library says, on one line and not too long, for the middle of a sentence."""
    return " ".join(str(error).split())[:300]


def as_written(value: object) -> str:
    """Return a value the way a user would write it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(as_written(item) for item in value)}]"
    return str(value)


def check_choices(group: str, part: object, **allowed: list[str]) -> None:
    """Raise :class:`UserError` where a key of ``part`` is none of its allowed values; null is checked by its type."""
    for name, values in allowed.items():
        if getattr(part, name) is not None:
            check_choice(f"{group}.{name}", getattr(part, name), values)


def check_choice(key: str, value: str | None, allowed: Iterable[str]) -> None:
    """Raise :class:`UserError` unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{key}={value}: must be one of {', '.join(allowed)}{nearest(str(value), allowed)}")


def check_minimums(group: str, part: object, **minimums: float) -> None:
    """Raise :class:`UserError` where a key of ``part`` is given and smaller than its minimum."""
    for name, minimum in minimums.items():
        check_at_least(f"{group}.{name}", getattr(part, name), minimum)


def check_at_least(key: str, value: float | None, minimum: float) -> None:
    """Raise :class:`UserError` if ``value`` is given and smaller than ``minimum``, or not finite."""
    if value is not None and not value >= minimum:
        raise UserError(f"{key}={value}: must be at least {minimum}")
    if value is not None:
        check_finite(key, value)


def check_finite(key: str, value: float) -> None:
    """Raise :class:`UserError` if ``value`` is infinite."""
    if math.isinf(value):
        raise UserError(f"{key}={value}: must be a finite number")


def check_above_zero(key: str, value: float) -> None:
    """Raise :class:`UserError` unless ``value`` is larger than 0, and finite."""
    if not value > 0:
        raise UserError(f"{key}={value}: must be above 0")
    check_finite(key, value)


def check_fraction(key: str, value: float, *, below_one: bool = False) -> None:
    """Raise :class:`UserError` unless 0 <= value <= 1 (``below_one``: < 1)."""
    if not (0 <= value < 1 if below_one else 0 <= value <= 1):
        raise UserError(f"{key}={value}: must be between 0 and 1{' (1 itself excluded)' if below_one else ''}")


def check_auto_or_count(key: str, value: str, at_most: int | None = None) -> None:
    """Raise :class:`UserError` unless ``value`` is ``auto`` or a whole number from 1 on, ``at_most`` so many."""
    if value != "auto" and not (value.isdigit() and 1 <= int(value) <= (at_most or int(value))):
        most = f" and at most {at_most}" if at_most else ""
        raise UserError(f"{key}={value}: must be auto or a whole number of at least 1{most}")
