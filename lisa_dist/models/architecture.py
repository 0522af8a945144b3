"""From ``model.*`` keys to a network on the meta device: no weight is read, no memory is used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from lisa_dist.config import ModelConfig, UserError
from lisa_dist.config.errors import nearest
from lisa_dist.config.model import BUILTIN_PREFIX
from lisa_dist.hub import stay_offline_where_unreachable

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"


def local_directory(path: str) -> Path | None:
    """Return the directory that ``path`` names, or None where it is a hub id.

    ``builtin:NAME`` is a directory of this package.

    Raises:
        UserError: ``path`` can only be a directory and there is none.
    """
    if path.startswith(BUILTIN_PREFIX):
        directory = Path(__file__).parent / path.removeprefix(BUILTIN_PREFIX)
        if not (directory / CONFIG_FILE).is_file():
            known = sorted(
                f"{BUILTIN_PREFIX}{found.parent.name}" for found in Path(__file__).parent.glob("*/config.json")
            )
            raise UserError(f"model.path={path}: the built-in models are {', '.join(known)}{nearest(path, known)}")
        return directory
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        raise UserError(f"model.path={path}: must be a directory with a config.json, or a hub id, but is a file")
    if directory.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UserError(f"model.path={path}: no such directory")
    return None


def read_architecture(config: ModelConfig, *, without_weights: bool = False) -> PretrainedConfig:
    """Return the Hugging Face config of the model, its cache off and its attention kernel set.

    A directory's config.json comes first. For a hub id the hub's comes before the preset's ``model.architecture``,
    unless no weights will be read (``model.init=random``, or ``without_weights`` for planning). Of a model of
    several modalities only the language model is taken.

    Raises:
        UserError: no architecture is to be found, its type is unknown, or it needs code that comes with the model.
    """
    directory = None if config.path is None else local_directory(config.path)
    weightless = without_weights or config.initialization == "random"
    if directory is not None:
        architecture = _read_directory(config, directory)
    elif config.architecture and (config.path is None or weightless):
        architecture = _from_fields(config.architecture)
    elif config.path is not None:
        architecture = _read_hub(config, config.path)
    else:
        raise UserError("model.path=null: name a Hugging Face directory, a hub id or builtin:demo, or choose a preset")
    architecture = architecture.get_text_config(decoder=True)
    architecture.use_cache = False
    if hasattr(architecture, "output_router_logits"):
        architecture.output_router_logits = False  # the loss head adds the router's loss where it is asked for
    if config.attention is not None:
        architecture._attn_implementation = config.attention
    return architecture


def build_meta_model(config: ModelConfig, architecture: PretrainedConfig | None = None) -> nn.Module:
    """Build the causal language model on the meta device, every parameter float32.

    Non-persistent buffers (rotary frequencies) are on meta too; ``loading.materialize`` recomputes them.

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
                attn_implementation=config.attention,
                trust_remote_code=config.trust_remote_code,
            )
    except ImportError as error:
        raise UserError(f"model.attention={config.attention}: {_first_line(error)}") from error
    except ValueError as error:
        reason = _first_line(error)
        if "attn_implementation" in reason:
            raise UserError(
                f"model.attention={config.attention}: this model has no such kernel; null chooses"
            ) from error
        raise UserError(f"model.path={config.path}: is no causal language model that can be built: {reason}") from error
    model.tie_weights()  # transformers 5.0 leaves that out on meta
    return model.train()


def original_class(model: nn.Module) -> Any:
    """Return the class of ``model`` as it was before ``fully_shard`` put its own in front."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def meta_replica(model: nn.Module) -> Any:
    """Return an unsharded copy of ``model`` on meta: names, full shapes, ties, without any memory."""
    with torch.device("meta"):
        replica = original_class(model)._from_config(model.config, dtype=torch.float32)
    replica.tie_weights()
    return replica


def _read_directory(config: ModelConfig, directory: Path) -> PretrainedConfig:
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"model.path={config.path}: the directory has no {CONFIG_FILE}, so it is no Hugging Face model")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"model.path={config.path}: {CONFIG_FILE} is no valid JSON: {error}") from error
    _check_code(config, fields)
    return AutoConfig.from_pretrained(directory, trust_remote_code=config.trust_remote_code)


def _read_hub(config: ModelConfig, hub_id: str) -> PretrainedConfig:
    stay_offline_where_unreachable()
    try:
        fields, _ = PretrainedConfig.get_config_dict(hub_id)
    except OSError as error:
        raise UserError(
            f"model.path={hub_id}: no such directory, and the hub's {CONFIG_FILE} can't be read ({_first_line(error)})"
        ) from error
    _check_code(config, fields)
    return AutoConfig.from_pretrained(hub_id, trust_remote_code=config.trust_remote_code)


def _from_fields(fields: dict[str, Any]) -> PretrainedConfig:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    _check_type("model.architecture.model_type", model_type)
    return AutoConfig.for_model(model_type, **fields)


def _check_code(config: ModelConfig, fields: dict[str, Any]) -> None:
    """Refuse code that comes with the model unless ``model.trust_remote_code`` is set; warn where it is."""
    model_type = fields.get("model_type")
    if config.trust_remote_code:
        if "auto_map" in fields:
            logger.warning(
                "model.trust_remote_code=true: Python code that comes with %s RUNS ON THIS MACHINE, with your rights",
                config.path,
            )
        return
    if "auto_map" in fields and model_type not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"model.path={config.path}: this model needs Python code of its own, which is run only with "
            "model.trust_remote_code=true, after you have read it"
        )
    _check_type(f"model.path={config.path}: model_type of {CONFIG_FILE}", model_type)


def _check_type(key: str, model_type: str | None) -> None:
    if model_type not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{key}={model_type}: unknown to transformers {transformers.__version__}"
            f"{nearest(str(model_type), CONFIG_MAPPING_NAMES)}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
