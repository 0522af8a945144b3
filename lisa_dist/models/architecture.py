"""From ``model.*`` keys to a network on the meta device: no weight is read, no memory is used."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.config.errors import in_one_line, nearest
from lisa_dist.config.paths import MODEL_CONFIG, check_model_directory, model_directory
from lisa_dist.models.directory import check_not_quantized
from lisa_dist.models.model_kinds import check_is_decoder
from lisa_dist.runtime.files import read_json_object, stay_offline_where_unreachable

logger = logging.getLogger(__name__)

POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "n_positions")  # how many positions a model was made for
_OTHER_MODALITY = re.compile("vision|visual|image|img|audio|speech|video")


def read_architecture(config: ModelConfig, *, without_weights: bool = False) -> PretrainedConfig:
    """Return the Hugging Face config of the model, its cache off and its attention kernel set.

    A directory's config.json comes first. For a hub id the hub's comes before the preset's ``model.architecture``,
    unless no weights will be read (``model.init=random``, or ``without_weights`` for planning).

    Raises:
        UserError: no architecture is to be found, its type is unknown, it needs code that comes with the model, its
            weights are quantised, it is the language model of several modalities, or no decoder.
    """
    config.check_is_named()
    directory = None if config.path is None else model_directory(config.path)
    weightless = without_weights or config.initialization == "random"
    if directory is None and config.architecture and (config.path is None or weightless):
        architecture = from_fields(config.architecture)
    else:
        architecture = _read(config, directory)
    whole, architecture = architecture, _text_alone(config, architecture)
    check_is_decoder(config.named, whole)
    architecture.use_cache = False
    if hasattr(architecture, "output_router_logits"):
        architecture.output_router_logits = False  # the loss head adds the router's loss where it is asked for
    if config.own_attention is not None:
        architecture._attn_implementation = config.own_attention
    return architecture


def build_meta_model(config: ModelConfig, architecture: PretrainedConfig | None = None) -> nn.Module:
    """Build the causal language model on the meta device, every parameter float32.

    Non-persistent buffers (rotary frequencies) are on meta too; ``loading.restore_buffers`` computes them.

    Raises:
        UserError: as ``read_architecture``; or the architecture has no causal language model, or lacks the
            package of its attention kernel.
    """
    architecture = read_architecture(config) if architecture is None else architecture
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                architecture,
                dtype=torch.float32,
                attn_implementation=config.own_attention,
                trust_remote_code=config.trust_remote_code,
            )
    except ImportError as error:
        raise UserError(f"model.attention={config.attention}: {_first_line(error)}") from error
    except ValueError as error:
        reason = _first_line(error)
        if "attn_implementation" in reason:
            raise UserError(
                f"model.attention={config.attention}: this model has no such kernel; auto chooses"
            ) from error
        raise UserError(f"{config.named}: is no causal language model that can be built: {reason}") from error
    except Exception as error:  # transformers raises whatever its code runs into where a field is missing or wrong
        raise UserError(
            f"{config.named}: model_type={architecture.model_type} can't be built from its configuration, "
            f"a field is missing or wrong ({type(error).__name__}: {_first_line(error)})"
        ) from error
    model.tie_weights()  # transformers 5.0 leaves that out on meta
    return keep_untrainable(model).train()


def keep_untrainable(model: nn.Module) -> nn.Module:
    """Make buffers of the parameters that the model itself declares not to train, as biases of routers; return it.

    So they are neither trained nor stored in another dtype: rounded to bfloat16 such a bias chooses other experts.
    """
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[key]
                module.register_buffer(key, parameter.data)
    return model


def set_depth(architecture: PretrainedConfig, num_blocks: int) -> None:
    """Let an architecture have another number of blocks, whose kinds are listed as often as there are blocks."""
    architecture.num_hidden_layers = num_blocks
    kinds = getattr(architecture, "layer_types", None)
    if kinds:
        architecture.layer_types = (list(kinds) * num_blocks)[:num_blocks]


def head_size(architecture: Any) -> int | None:
    """Return how many numbers an attention head has; None of an architecture without attention, as Mamba and RWKV.

    Of layers whose heads differ, as Gemma 4's, those of the largest.
    """
    try:
        heads = getattr(architecture, "num_attention_heads", None)
        return None if heads is None else getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    except RuntimeError:  # how transformers 5.24 answers where they differ
        return max(head_size(layer) or 0 for layer in architecture.per_layer_config)


def original_class(model: nn.Module) -> Any:
    """Return the class of ``model`` as it was before ``fully_shard`` put its own in front."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def meta_replica(model: nn.Module) -> Any:
    """Return an unsharded copy of ``model`` on meta: names, full shapes, ties, without any memory."""
    with torch.device("meta"):
        replica = original_class(model)._from_config(model.config, dtype=torch.float32)
    replica.tie_weights()
    return keep_untrainable(replica)


def _read(config: ModelConfig, directory: Path | None) -> PretrainedConfig:
    """Read the config.json of a directory, or of the hub id ``model.path``."""
    if directory is not None:
        key = f"model.path={config.path}"
        check_model_directory(directory, key)
        fields = read_json_object(directory / MODEL_CONFIG, key)
    else:
        stay_offline_where_unreachable()
        try:
            fields, _ = PretrainedConfig.get_config_dict(config.path)
        except OSError as error:
            raise UserError(
                f"model.path={config.path}: no such directory, and the hub's {MODEL_CONFIG} can't be read "
                f"({_first_line(error)})"
            ) from error
    _check_fields(config, fields)
    try:
        return AutoConfig.from_pretrained(str(directory or config.path), trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises many kinds, and code that comes with a model any
        raise UserError(f"model.path={config.path}: {MODEL_CONFIG} can't be used ({in_one_line(error)})") from error


def _text_alone(config: ModelConfig, architecture: PretrainedConfig) -> PretrainedConfig:
    """Refuse a model of several modalities: its language model alone would be trained and exported, unasked."""
    nested = [name for name, value in architecture.to_dict().items() if isinstance(value, dict) and value]
    parts = sorted(name for name in nested if name in architecture.sub_configs or _OTHER_MODALITY.search(name))
    several = any(_OTHER_MODALITY.search(part) for part in parts)
    if not several:
        text = architecture.get_text_config(decoder=True)
        if text is architecture or architecture.is_encoder_decoder:
            return text
    raise UserError(
        f"{config.named}: model_type={architecture.model_type} is a language model and more "
        f"({', '.join(parts)}); here its language model alone could be trained, and an export would lack the rest, "
        "so choose a directory that holds a text-only model"
    )


def from_fields(fields: dict[str, Any]) -> PretrainedConfig:
    """Return the Hugging Face config of the fields ``model.architecture``.

    Raises:
        UserError: transformers does not know its type, or not with these fields.
    """
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    _check_type("model.architecture.model_type", model_type)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each configuration checks its fields in its own way
        raise UserError(
            f"model.architecture: model_type={model_type} can't have these fields ({in_one_line(error)})"
        ) from error


def _check_fields(config: ModelConfig, fields: dict[str, Any]) -> None:
    """Refuse weights that are stored quantised, and code that comes with the model unless it may run."""
    check_not_quantized(fields, f"model.path={config.path}")
    if config.trust_remote_code and "auto_map" in fields:
        logger.warning(
            "model.trust_remote_code=true: Python code that comes with %s RUNS ON THIS MACHINE, with your rights",
            config.path,
        )
    elif "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"model.path={config.path}: this model needs Python code of its own, which is run only with "
            "model.trust_remote_code=true, after you have read it"
        )
    if not config.trust_remote_code:
        _check_type(f"model.path={config.path}: model_type of {MODEL_CONFIG}", fields.get("model_type"))


def _check_type(key: str, model_type: str | None) -> None:
    if model_type not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{key}={model_type}: unknown to transformers {transformers.__version__}"
            f"{nearest(str(model_type), CONFIG_MAPPING_NAMES)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
