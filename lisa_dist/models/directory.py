"""What a model's directory says of itself: told before a rank starts, so nothing slow is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.paths import MODEL_CONFIG
from lisa_dist.runtime.files import check_is_whole, read_json_object


def check_model_files(directory: Path, key: str, *, weights: bool = True) -> None:
    """Raise :class:`UserError` where a model's files are no whole ones, or its weights are stored quantised.

    Args:
        directory: of Hugging Face.
        key: what named it, as ``model.path=DIR``.
        weights: they will be loaded.
    """
    check_not_quantized(read_json_object(directory / MODEL_CONFIG, key), key)
    for file in sorted(directory.glob("*.safetensors")) if weights else []:
        check_is_whole(file, key)


def check_not_quantized(fields: dict[str, Any], key: str) -> None:
    """Raise :class:`UserError` where a model's configuration says that its weights are stored quantised."""
    quantized = fields.get("quantization_config") or fields.get("compression_config")
    if not quantized:
        return
    method = quantized.get("quant_method", "unnamed") if isinstance(quantized, dict) else quantized
    raise UserError(
        f"{key}: its weights are stored quantised (quantization_config of {MODEL_CONFIG}: {method}), which can't be "
        "trained here; choose the model's unquantised weights, which model.quantization=nf4 or int8 quantises for "
        "adapters"
    )
