"""Supervised fine-tuning: the cross-entropy of each token that has a label, summed, and divided by their number."""

from __future__ import annotations

import re

from torch import Tensor, nn

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.data.batches import MicroBatch, label_tokens, on_device
from lisa_dist.models.architecture import original_class
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.objectives import Objective
from lisa_dist.objectives.chunked_head import install_loss_head

_MIXED = re.compile(r"(same dtype|scalar type).*BFloat16|mixed dtype")  # how torch refuses two dtypes at once


def prepare_supervised(model: nn.Module, layers: LayerMap, config: ModelConfig, in_place: bool) -> Objective:
    """Let the model compute its loss in chunks, and return the objective. Call it before the model is sharded.

    See :func:`install_loss_head`, which does the first.
    """
    install_loss_head(model, layers, config.chunk_tokens(in_place), config.router_aux_loss, in_place)
    return supervised


def supervised(model: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, int]:
    """Return the summed loss over the label tokens and their number, as an :class:`Objective` does.

    Raises:
        UserError: the model's own code does not compute in bfloat16.
    """
    try:
        return model(**on_device(micro_batch)), label_tokens(micro_batch)
    except RuntimeError as error:
        if not _MIXED.search(str(error)):
            raise
        raise UserError(
            f"precision.compute=bfloat16: the code of {original_class(model).__name__} mixes it with float32 "
            f"({in_one_line(error)}); set precision.compute=float32"
        ) from error
