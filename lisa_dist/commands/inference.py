"""A trained model opened to be used and not trained: a checkpoint of a run, or a Hugging Face directory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lisa_dist.checkpoint.description import described_model
from lisa_dist.checkpoint.export import find_checkpoint
from lisa_dist.checkpoint.manifest import step_of
from lisa_dist.checkpoint.restore import restore_weights
from lisa_dist.checkpoint.state import read_state
from lisa_dist.config import AlwaysActiveConfig, Config, LoggerConfig
from lisa_dist.config.optimization import AdamWConfig
from lisa_dist.config.paths import model_directory
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.config.updates import FullRankUpdateConfig
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.method.module import TrainModule, allocate, build_train_module
from lisa_dist.models.architecture import read_architecture
from lisa_dist.models.loading import load_pretrained
from lisa_dist.runtime import distributed
from lisa_dist.training.generation import ends_of, not_followed, own_settings
from lisa_dist.training.limits import check_token, open_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class OpenedModel:
    """A model whose blocks are all frozen and sharded over the ranks, and where it came from."""

    train_module: TrainModule
    tokenizer: PreTrainedTokenizerBase
    source: str
    step: int | None  # of the checkpoint; None for a Hugging Face directory

    def check_tokens(self, ids: Iterable[int], where: str) -> None:
        """Raise :class:`UserError` where ``ids``, those of ``where``, hold a token that the model does not know."""
        module: Any = self.train_module.store.module
        check_token(max(ids, default=0), self.tokenizer, module.config.vocab_size, where)


def open_model(config: Config, path: str | None, step: int | None, command: str) -> OpenedModel:
    """Open the Hugging Face directory ``path``, or without one the checkpoint of ``run.dir``.

    Collective: every rank.

    Args:
        config: of the run, or the defaults.
        path: a directory or a hub id.
        step: which checkpoint; None: the newest complete one.
        command: whose keys are named in messages.

    Raises:
        UserError: there is nothing that can be opened.
    """
    frozen = without_training(config, path)
    if path is not None:
        tokenizer = open_tokenizer(frozen.model)
        train_module = build_train_module(frozen)
        allocate(train_module, [], distributed.device())
        load_pretrained(train_module.store.module, path)
        if distributed.is_main():
            logger.info("%s: computed in %s (precision.compute)", path, frozen.precision.compute)
        return OpenedModel(train_module, tokenizer, path, None)
    run = RunDirectory.of(config)  # launching/inputs.py has seen that one of the two is named
    checkpoint: Path = distributed.on_rank_zero(lambda: find_checkpoint(run.checkpoints, step, f"{command}.step"))
    tokenizer = load_tokenizer(str(run.tokenizer), config.model.trust_remote_code)
    model = described_model(run, config.model)
    train_module = build_train_module(replace(frozen, model=model), read_architecture(model))
    allocate(train_module, [], distributed.device())
    restore_weights(train_module, checkpoint, distributed.on_rank_zero(lambda: read_state(checkpoint)))
    return OpenedModel(train_module, tokenizer, str(checkpoint), step_of(checkpoint))


def answer_ends(config: Config, opened: OpenedModel, path: str | None) -> set[int]:
    """Return the tokens that end an answer of the model that :func:`open_model` opened from ``path`` or a run.

    Say what else its files ask of answers and do not get. Collective: every rank.
    """
    source = str(RunDirectory.of(config).model if path is None else model_directory(path) or path)
    ends = ends_of(opened.tokenizer, opened.train_module, source)
    temperature = config.generate.temperature
    ignored = distributed.on_rank_zero(lambda: not_followed(own_settings(opened.train_module, source), temperature))
    if ignored and distributed.is_main():
        logger.warning(
            "%s: its generation settings have %s, which answers here do not follow and those of transformers' generate "
            "do: here a token is %s",
            source,
            ", ".join(f"{name}={str(value)[:40]}" for name, value in ignored.items()),
            "drawn from softmax(logits / generate.temperature)" if temperature > 0 else "the most likely one",
        )
    return ends


def without_training(config: Config, path: str | None) -> Config:
    """Return ``config`` with nothing that trains: everything frozen, and stored in the dtype of the arithmetic.

    So no optimizer state is made, and a forward pass sees what it sees in training: masters are rounded to
    ``precision.compute`` when they are read and not when they are gathered.
    """
    compute = config.precision.compute
    quiet = replace(
        config,
        sampler=UniformSamplerConfig(active_layers=1),  # never asked; it fits any number of blocks
        optimizer=AdamWConfig(),
        logger=LoggerConfig(),
        always_active=AlwaysActiveConfig(embeddings=False, norm=False, head=False),
        precision=replace(config.precision, frozen=compute, active=compute),
        parallel=replace(config.parallel, block_major=False, offload_activations=False),
    )
    if path is None:
        return quiet
    model = replace(config.model, name=path, path=path, init="pretrained", architecture={})
    if config.run.dir is not None:  # whose model is another
        model = replace(model, tokenizer=None, blocks=None, quantization="none")
    return replace(quiet, model=model, update=FullRankUpdateConfig())
