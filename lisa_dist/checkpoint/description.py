"""All of an exported directory but the weights and the tokenizer: written when a run starts, copied by an export.

So what an export could fail at fails in the run's first minute, and an export needs nothing of the directory or the
hub that the run started from.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from lisa_dist.checkpoint.code_files import GENERATE, copy_code
from lisa_dist.config import ModelConfig, UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.config.paths import MODEL_CONFIG, model_directory
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.stops import ids_of, stop_ids
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.models.architecture import build_meta_model, from_fields, read_architecture
from lisa_dist.runtime.files import new_folder, read_json_object, write_json_object

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
# Fields of a configuration that say nothing of the network, or that the weights settle.
NO_ARCHITECTURE = {"architectures", "auto_map", "dtype", "tie_word_embeddings", "transformers_version", "_name_or_path"}
NO_ARCHITECTURE |= {"use_cache", "bos_token_id", "eos_token_id"}
# Settings that decide whether others are allowed: they are taken first.
_MODES = ["do_sample", "num_beams", "use_cache", "return_dict_in_generate", "suppress_tokens", "cache_implementation"]
# Text that tokenizers treat differently: blanks, digits, other scripts, marks of their own.
_PROBE = "Two words,\n  \tnumbers 12345, naïve 日本語 🙂 <s> </s> <|endoftext|> <|im_end|>"


def described_model(run: RunDirectory, model: ModelConfig) -> ModelConfig:
    """Return the keys ``model.*`` of a run with its own description instead of what it started from.

    Raises:
        UserError: the run directory has none.
    """
    if not (run.model / MODEL_CONFIG).is_file():
        raise UserError(
            f"run.dir={run.path}: has no {run.model.name}/{MODEL_CONFIG}, which a run writes when it starts"
        )
    return replace(model, path=str(run.model), init=model.initialization, architecture={})


def was_untied(run: RunDirectory) -> bool:
    """Whether the run was started with a head of its own where config.json ties it to the embeddings."""
    file = run.model / MODEL_CONFIG
    return file.is_file() and read_json_object(file, f"run.dir={run.path}").get("tie_word_embeddings") is False


def check_same_architecture(run: RunDirectory, model: ModelConfig, architecture: PretrainedConfig) -> None:
    """Raise :class:`UserError` where a run would go on with another architecture than the one that it began with.

    Weights of the same shapes may be there for other frequencies, scales or norms, and an export has the first ones.
    """
    if not (run.model / MODEL_CONFIG).is_file():
        return
    began = read_architecture(described_model(run, model))
    then, now = (json.loads(one.to_json_string(use_diff=False)) for one in (began, architecture))
    keys = sorted((then.keys() | now.keys()) - NO_ARCHITECTURE)
    different = [f"{key}={then.get(key)} then, {now.get(key)} now" for key in keys if then.get(key) != now.get(key)]
    if different:
        raise UserError(
            f"checkpoint.resume=auto: model.path={model.path} is another architecture than the one that the run began "
            f"with: {', '.join(different)}; go on with that one, or choose another run.dir"
        )


def write_description(run: RunDirectory, model: ModelConfig, architecture: PretrainedConfig) -> None:
    """Write config.json, generation_config.json and the code that comes with the model to the run directory.

    The folder is there when all is written; then it is read again, as transformers would; the model is built too, where
    its code was copied. ``architecture`` is that which is trained; its dtype is that of the weights.

    Raises:
        UserError: a file of the model is damaged, or can't be written.
    """
    shutil.rmtree(run.model, ignore_errors=True)  # of a start that failed before its first step
    source = _model_source(model)
    try:
        with new_folder(run.model) as unfinished:
            fields = _config_fields(model, architecture, source)
            if source is not None:
                copy_code(partial(source_file, source), fields, unfinished, GENERATE)
            write_json_object(fields, unfinished / MODEL_CONFIG)
            generation = _generation_fields(model, architecture, source, fields)
            write_json_object(generation, unfinished / GENERATION_FILE)
    except OSError as error:
        raise UserError(f"run.dir={run.path}: {run.model} can't be written ({error.strerror or error})") from error
    described = described_model(run, model)
    try:
        again = read_architecture(described)
        if "auto_map" in fields:
            build_meta_model(described, again)
    except UserError as error:
        raise UserError(f"model.path={model.path}: what an export would hold of it can't be used: {error}") from error


def write_tokenizer(folder: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer, its chat template and the code that comes with it to a folder; read it again.

    Raises:
        UserError: it can't be saved, or not be read again.
    """
    key = f"model.tokenizer={model.tokenizer or model.path}"
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers raises many kinds, and code that comes with a tokenizer any
        raise UserError(f"{key}: can't be saved for an export ({in_one_line(error)})") from error
    settings = folder / "tokenizer_config.json"
    source = _model_source(replace(model, path=model.tokenizer or model.path, architecture={}))
    fields = in_words_of_all(read_json_object(settings, key))
    if source is not None and "auto_map" in fields:
        copy_code(partial(source_file, source), fields, folder)
    write_json_object(fields, settings)
    again = load_tokenizer(str(folder), model.trust_remote_code)
    if again(_PROBE).input_ids != tokenizer(_PROBE).input_ids or again.chat_template != tokenizer.chat_template:
        logger.warning("%s: once saved and read again, it encodes otherwise; an export will hold it as saved", key)


def in_words_of_all(fields: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json in names that transformers 4 knows as well as 5, whose new ones 4 fails at."""
    fields = dict(fields)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields


def _model_source(model: ModelConfig) -> str | None:
    """Return the directory or the hub id that holds the model's files, None where its fields are in the preset."""
    directory = model_directory(model.path) if model.path else None
    if directory is not None:
        return str(directory)
    return None if model.architecture and (model.path is None or model.initialization == "random") else model.path


def source_file(source: str, name: str) -> Path | None:
    """Return a file of a directory or hub id, downloaded where it must be, or None where there is none."""
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _config_fields(model: ModelConfig, architecture: PretrainedConfig, source: str | None) -> dict[str, Any]:
    """Return the source's own fields, less what training sets, with the dtype and the ties of the weights."""
    if source is None:
        fields = json.loads(from_fields(model.architecture).to_json_string(use_diff=True))
    else:
        file = source_file(source, MODEL_CONFIG)
        if file is None:
            raise UserError(f"model.path={model.path}: its {MODEL_CONFIG} can't be read again")
        fields = read_json_object(file, f"model.path={model.path}")
    dtype = torch.bfloat16 if model.initialization == "random" else architecture.dtype
    set_dtype(fields, dtype)
    fields["tie_word_embeddings"] = bool(getattr(architecture, "tie_word_embeddings", False))
    return fields


def set_dtype(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Set the dtype of config.json under the name that it has there (older ones say ``torch_dtype``)."""
    known = [key for key in ("dtype", "torch_dtype") if key in fields]
    fields.update(dict.fromkeys(known or ["dtype"], str(dtype).removeprefix("torch.")))


def _generation_fields(
    model: ModelConfig, architecture: PretrainedConfig, source: str | None, fields: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings of the model's own file for them, or those that its config.json holds."""
    file = None if source is None else source_file(source, GENERATION_FILE)
    if file is not None:
        return repaired(read_json_object(file, f"model.path={model.path}"), GENERATION_FILE)
    return repaired(generation_fields({**architecture.to_dict(), "use_cache": None, **fields}), MODEL_CONFIG)


def generation_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of generation that a config.json holds."""
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    return {name: value for name, value in fields.items() if name in known and value is not None}


def add_ends(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end where answers were trained to: at the tokenizer's EOS and at what ends a turn.

    ``fields`` are those of generation_config.json, changed in place; what is added to them is logged.
    """
    known = ids_of(fields.get("eos_token_id"))
    added = sorted(stop_ids(tokenizer) - set(known))
    if added:
        fields["eos_token_id"] = [*known, *added]
        logger.info(
            "%s: eos_token_id=%s, to end answers where they were trained to end (%s)",
            *(GENERATION_FILE, fields["eos_token_id"], " ".join(tokenizer.convert_ids_to_tokens(added))),
        )


def repaired(fields: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the settings of generation that are valid together, in their order; what is left out is logged.

    A sampling parameter beside ``do_sample=false`` has no effect on the answers, and leaving it out has none either.
    ``origin`` is the file they come from, for the message.
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
