"""What can be known of a command's inputs without torch: told within a second, before there are ranks or files.

What it takes torch, transformers or the hub to know is told by the ranks, as early as they know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lisa_dist.config import Config, ModelConfig, UserError
from lisa_dist.config.checks import check_global_batch, check_package, check_streamed
from lisa_dist.config.data import PREVIEW_START
from lisa_dist.config.errors import as_written, check_choice
from lisa_dist.config.gpu import read_gpu
from lisa_dist.config.loading import group_choices
from lisa_dist.config.paths import (
    check_has_weights,
    check_is_new,
    check_may_replace,
    check_model_directory,
    followed,
    local_path,
    model_directory,
    nearest_path,
    path_exists,
)
from lisa_dist.config.prompts import check_output, read_prompts
from lisa_dist.config.run_directory import RunDirectory, check_run_dir_is_free
from lisa_dist.data.first_row import check_rows
from lisa_dist.data.locate import check_data, is_local, locate
from lisa_dist.data.tokenizer_files import check_tokenizer_files
from lisa_dist.models.directory import check_model_files
from lisa_dist.runtime.files import make_folder
from lisa_dist.telemetry.run_lock import check_nobody_trains

RESULTS_START = '{\n "model": '  # of a file of ``lisa-dist evaluate``


def check_training(config: Config) -> None:
    """Raise :class:`UserError` where training, with ``run.dir`` settled, can't begin."""
    check_run_dir_is_free(config)
    check_nobody_trains(RunDirectory.of(config))
    check_read(config)
    local = config.parallel.nproc_per_node
    if config.checkpoint.resume == "none":
        check_global_batch(config.train, 1 if local == "auto" else int(local))
    if local != "auto":
        check_streamed(config, config.parallel.nodes * int(local))


def check_read(config: Config) -> None:
    """Raise :class:`UserError` where the model or the data to train with are not there, or a preview has no place."""
    _check_model(config.model)
    check_data(config.data)
    if config.data.preview_file is not None:
        check_may_replace(local_path(config.data.preview_file), "data.preview_file", PREVIEW_START)
    check_rows(config.data)
    _check_files(config.model, config.model.path, "model.path")


def check_export(config: Config) -> None:
    """Raise :class:`UserError` where there is no run to export, or no place for it."""
    if config.run.dir is None:
        raise UserError("run.dir=null: name the directory of the run to export")
    if config.export.path is None:
        raise UserError("export.path=null: name the Hugging Face directory to write")
    check_is_new(followed(config.export.path), "export.path")
    _check_has_checkpoints(config)


def check_bench(config: Config) -> None:
    """Raise :class:`UserError` where the data to measure with are named, and not there or none."""
    if config.data.path is not None:
        check_data(config.data)
        check_rows(config.data)


def check_plan(config: Config) -> None:
    """Raise :class:`UserError` where no such GPU is known, or no such method to compare with."""
    read_gpu(config.plan.gpu)
    for method in config.plan.compare:
        check_choice("plan.compare", method, group_choices("method"))


def check_evaluate(config: Config) -> None:
    """Raise :class:`UserError` where no model or no data to evaluate are named, or are not there."""
    choice = config.evaluate
    check_opened(config, choice.path, "evaluate.path")
    check_may_replace(results_file(config), "evaluate.output", RESULTS_START)
    if choice.path is not None and choice.data is None and config.run.dir is None and not choice.tasks:
        raise UserError("evaluate.data=null: name the data to evaluate evaluate.path on, or a run by run.dir=DIR")
    if choice.data is not None and not is_local(choice.data):
        locate(choice.data, key="evaluate.data")
    if choice.tasks:
        check_package("lm_eval", f"evaluate.tasks={as_written(choice.tasks)}", "lm-eval")
    if choice.data is not None:
        check_rows(replace(config.data, path=choice.data, split="train", validation=None), "evaluate.data")
    if choice.task_dir is not None and not local_path(choice.task_dir).is_dir():
        near = nearest_path(local_path(choice.task_dir))
        raise UserError(f"evaluate.task_dir={choice.task_dir}: must be a directory that exists{near}")
    _check_files(config.model, choice.path, "evaluate.path")


def results_file(config: Config) -> Path:
    """Return where the results go: without a run they are named as a run's would be, in the current directory."""
    run = RunDirectory.of(config) if config.run.dir else RunDirectory(Path())
    return local_path(config.evaluate.output) if config.evaluate.output else run.evaluation


def check_generate(config: Config) -> None:
    """Raise :class:`UserError` where no model or no prompt is named, or the answers can't be written."""
    check_opened(config, config.generate.path, "generate.path")
    read_prompts(config.generate.prompts)
    check_output(config.generate.output)
    _check_files(config.model, config.generate.path, "generate.path")


def make_room(output: str | None) -> None:
    """Make the folder of ``generate.output``; raise :class:`UserError` where the file is there, or can't be."""
    check_output(output)
    if output is not None:
        make_folder(local_path(output).parent, f"generate.output={output}")


def check_opened(config: Config, path: str | None, key: str) -> None:
    """Raise :class:`UserError` where neither ``path``, the value of ``key``, nor ``run.dir`` names a trained model."""
    group = key.partition(".")[0]
    step = getattr(config, group).step
    if path is not None and step is not None and key == f"{group}.path":
        raise UserError(f"{group}.step={step}: chooses a checkpoint of a run, and {key}={path} has none; leave it out")
    if path is not None:
        directory = _check_directory(path, key)
        if directory is not None:
            check_has_weights(directory, f"{key}={path}")
    elif config.run.dir is None:
        raise UserError(f"{key}=null: name a Hugging Face directory, or a run by run.dir=DIR")
    else:
        _check_has_checkpoints(config)


def _check_has_checkpoints(config: Config) -> None:
    if not path_exists(RunDirectory.of(config).checkpoints):
        raise UserError(f"run.dir={config.run.dir}: has no checkpoint yet")


def _check_model(model: ModelConfig) -> None:
    model.check_is_named()
    if model.path is not None:
        directory = _check_directory(model.path, "model.path")
        if directory is not None and model.initialization == "pretrained":
            check_has_weights(directory, f"model.path={model.path}", or_random=True)
    if model.tokenizer is not None:
        model_directory(model.tokenizer, "model.tokenizer")


def _check_directory(path: str, key: str) -> Path | None:
    """Return the directory of a model; None where ``path`` is a hub id."""
    directory = model_directory(path, key)
    if directory is not None:
        check_model_directory(directory, f"{key}={path}")
    return directory


def _check_files(model: ModelConfig, path: str | None, key: str) -> None:
    """Raise :class:`UserError` where the directory ``path``, the value of ``key``, holds broken or no files of a model,
    or its tokenizer's directory none of a tokenizer."""
    directory = None if path is None else model_directory(path, key)
    if directory is not None:
        random = key == "model.path" and model.initialization == "random"
        check_model_files(directory, f"{key}={path}", weights=not random)
    source = None if path is None else model.tokenizer or path
    directory = None if source is None else model_directory(source, "model.tokenizer")
    if directory is not None:
        check_tokenizer_files(directory, f"model.tokenizer={source}")


def check_chat(config: Config) -> None:
    """Raise :class:`UserError` where no model to talk with is named, or it is not there."""
    check_opened(config, config.generate.path, "generate.path")
    _check_files(config.model, config.generate.path, "generate.path")


CHECKS: dict[str, Callable[[Config], None]] = {
    "train": check_training,
    "plan": check_plan,
    "bench": check_bench,
    "export": check_export,
    "evaluate": check_evaluate,
    "generate": check_generate,
    "chat": check_chat,
}  # by command
