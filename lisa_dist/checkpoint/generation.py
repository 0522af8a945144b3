"""What a generation_config.json may say: settings that transformers refuses to save are left out and named."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
# Settings that decide whether others are allowed: they are taken first.
_MODES = ["do_sample", "num_beams", "use_cache", "return_dict_in_generate", "suppress_tokens", "cache_implementation"]


def repaired(fields: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings that are valid together, in their order; what is left out is said.

    A sampling parameter beside ``do_sample=false`` has no effect on the answers, and leaving it out has none either.

    Args:
        fields: of generation_config.json.
        origin: the file they come from, for the message.
    """
    if _problem(fields) is None:
        return fields
    kept: dict[str, Any] = {}
    for name in sorted(fields, key=lambda name: _MODES.index(name) if name in _MODES else len(_MODES)):
        problem = _problem({**kept, name: fields[name]})
        if problem is None:
            kept[name] = fields[name]
        else:
            logger.warning(
                "%s: %s=%s is left out of what an export writes, transformers would refuse to save it (%s)",
                *(origin, name, fields[name], problem),
            )
    return {name: fields[name] for name in fields if name in kept}


def generation_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of generation that a config.json holds, where a model has no file of its own for them."""
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    return {name: value for name, value in fields.items() if name in known and value is not None}


def _problem(fields: dict[str, Any]) -> str | None:
    """Return why transformers would refuse to save these settings, None where it would not."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        GenerationConfig.from_dict(fields).validate(strict=True)
    except Exception as error:  # values of the wrong type raise many kinds
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "GenerationConfig is invalid" not in line), type(error).__name__)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return None
