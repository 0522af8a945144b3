"""Keeps secrets out of what a run writes: the values of secret environment variables, and what looks like a token."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lisa_dist.config import Config, LaunchConfig
from lisa_dist.config.loading import to_yaml
from lisa_dist.config.paths import local_path, path_exists

HIDDEN = "***"
SHORTEST_SECRET = 8  # characters; a shorter value may be part of any word

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$", re.IGNORECASE)
# Hugging Face, OpenAI, GitHub, GitLab, AWS; keys in addresses (https://user:key@host).
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def hide_secrets(text: str) -> str:
    """Return ``text`` with every secret replaced by ``***``."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for secret in sorted((value for value in secrets if len(value) >= SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)


def hide_secrets_in(value: Any, hide: Callable[[str], str] = hide_secrets) -> Any:
    """Return a structure of dicts and lists with the secrets in its texts replaced, by ``hide``."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        return {key: hide_secrets_in(item, hide) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets_in(item, hide) for item in value]
    return value


def public_yaml(config: Config) -> str:
    """Return what config.yaml holds: no secrets, and not the job script's shell lines, which may hold some.

    A run is resumed by it, so a path that is there, or may name what is in a folder that is, stays as it is: the value
    of a secret variable may be a word of it.
    """

    def hide(text: str) -> str:
        path = local_path(text)
        named = path_exists(path) or (path.parent.name != "" and path_exists(path.parent))
        return text if named else hide_secrets(text)

    return to_yaml(replace(config, launch=LaunchConfig()), lambda settings: hide_secrets_in(settings, hide))


class RedactingFormatter(logging.Formatter):
    """A formatter whose lines, tracebacks too, hold no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))
