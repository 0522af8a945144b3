"""The optimizers, one specification a file; the optimizer over the active parameters, its schedule and its clipping.

It sees parameters by name and knows neither the sampler nor the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lisa_dist.config import OptimizerConfig
from lisa_dist.method.optim.adamw import adamw
from lisa_dist.method.optim.adamw8bit import adamw8bit
from lisa_dist.method.optim.lion import lion
from lisa_dist.method.optim.spec import OptimizerSpec

SPECS: dict[str, Callable[[Any], OptimizerSpec]] = {"adamw": adamw, "adamw8bit": adamw8bit, "lion": lion}


def optimizer_spec(config: OptimizerConfig) -> OptimizerSpec:
    """Return the specification of the optimizer that ``config`` describes.

    Raises:
        UserError: a package that it needs can't be imported.
    """
    return SPECS[config.name](config)
