"""What a run says once before its first step: what is effective, and what may not be what was meant."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.data.batches import GlobalBatches
from lisa_dist.data.prepare import PreparedData
from lisa_dist.data.sequences import Sequences
from lisa_dist.method.module import TrainModule
from lisa_dist.models.generation import positions_of
from lisa_dist.models.masking import rotary_limits
from lisa_dist.models.quantization import count_weights
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_count
from lisa_dist.telemetry.progress import announce

logger = logging.getLogger(__name__)


def announce_run(
    config: Config,
    train_module: TrainModule,
    data: PreparedData,
    batches: GlobalBatches,
    max_steps: int,
    progress: Progress,
) -> None:
    """Print once what is effective."""
    store, precision = train_module.store, config.precision
    architecture: Any = store.module.config
    total = sum(count_weights(name, store.parameter(name)) for name in store.names)
    blocks = len(store.layers.blocks)
    trained = f"{data.counts.trained_share:.0%} of {format_count(data.counts.tokens)} tokens trained"
    announce(
        {
            "run": str(config.run.dir),
            "ranks": f"{train_module.dims.num_ranks} ({train_module.dims}), {distributed.device().type}, "
            f"{torch.get_num_threads()} CPU threads a rank",
            "model": f"{config.model.path or config.model.name}: {format_count(total)} parameters in {blocks} blocks"
            f"{', head tied to the embeddings' if store.layers.tied else ''}, {config.model.initialization} weights",
            "method": f"{config.method}: sampler {config.sampler.name}, {train_module.sampler.sampler.num_active} of "
            f"{blocks} blocks{', embeddings and head' if config.sampler.draws_non_block_modules else ''} a period of "
            f"{config.sampler.period} steps; update {config.update.name}",
            "storage": f"frozen {precision.frozen}, active {precision.active}, compute {precision.compute}, "
            f"gradients reduced in {precision.reduce}, {precision.on_freeze} rounding on freeze",
            "attention": str(architecture._attn_implementation),
            "kernels": f"{train_module.kernels} (model.kernels={config.model.kernels})",
            "data": f"{config.data.path}: {batches.num_sequences} sequences, format {data.format}, {trained}",
            "rows": data.counts.describe(),
            **({"padding": describe_padding(batches)} if batches.group_by_length else {}),
            **({} if data.validation_counts is None else {"validation rows": data.validation_counts.describe()}),
            "steps": f"{progress.step} of {max_steps} done, global batch {config.train.global_batch_size} = "
            f"{config.train.micro_batch_size} a micro-batch",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        },
        title="lisa-dist",
    )
    parameters = {name: store.parameter(name) for name in store.names}
    coverage = train_module.update.describe_coverage(parameters, store.layers)
    if coverage is not None:
        logger.info("update=%s: %s", config.update.name, coverage)


def describe_padding(batches: GlobalBatches) -> str:
    """Return in words what grouping by length saves in the first epoch."""
    grouped, ungrouped = batches.padding_of_epoch(0), batches.padding_of_epoch(0, grouped=False)
    return (
        f"{format_count(grouped)} tokens of the first epoch, grouped by length; {format_count(ungrouped - grouped)} "
        f"fewer than the {format_count(ungrouped)} without data.group_by_length"
    )


def warn_of_data(config: Config, architecture: PretrainedConfig, sequences: Sequences) -> None:
    """Warn, on rank 0, of rows that may not be what was meant for the model."""
    if not distributed.is_main():
        return
    warn_of_positions(config.data.sequence_length, architecture)
    warn_of_demonstration(config)
    if config.train.micro_batch_size > 1 and not config.data.packing:
        warn_of_rotary_limits(sequences, architecture, grouped=config.data.group_by_length)


def warn_of_settings(config: Config, data_ranks: int, has_validation: bool, max_steps: int) -> None:
    """Warn, on rank 0, of options without effect and of a warm-up that is longer than the run."""
    if not distributed.is_main():
        return
    for sentence in options_without_effect(config, data_ranks, has_validation):
        logger.warning(sentence)
    warn_of_warmup(config, max_steps)


def warn_of_positions(sequence_length: int, architecture: PretrainedConfig) -> None:
    """Warn where sequences may be longer than what the model was made for."""
    positions = positions_of(architecture)
    if positions is not None and sequence_length > positions:
        logger.warning(
            "data.sequence_length=%d: is above the %d positions of the model; what is longer trains positions that it "
            "has never seen, or fails where positions are a table",
            sequence_length,
            positions,
        )


def warn_of_rotary_limits(sequences: Sequences, architecture: PretrainedConfig, *, grouped: bool) -> None:
    """Warn where the longest row of a micro-batch gives its shorter ones other numbers than they have alone."""
    for name, limit in rotary_limits(architecture).items():
        longer = int((sequences.lengths > limit).sum())
        if 0 < longer < len(sequences):
            logger.warning(
                "%d of %d rows have more than %d tokens, and give shorter rows of their micro-batch other numbers than "
                "alone (%s of the model's config.json); train.micro_batch_size=1 or data.sequence_length=%d keeps them "
                "apart, data.group_by_length=true %s",
                *(longer, len(sequences), limit, name, limit, "not all of them" if grouped else "most of them"),
            )


def warn_of_demonstration(config: Config) -> None:
    """Warn where a model of the user's own trains on the data of the package, as it does without ``data.path``."""
    if config.data.path == "builtin:demo" and config.model.path != "builtin:demo":
        logger.warning(
            "data.path=builtin:demo: the model %s is trained on the demonstration's questions; data.path names yours",
            config.model.path or config.model.name,
        )


def warn_of_warmup(config: Config, max_steps: int) -> None:
    """Warn where the run ends before the learning rate is the one that was asked for."""
    warmup = config.scheduler.warmup_steps
    if warmup > max_steps:
        logger.warning(
            "scheduler.warmup_steps=%d: is above the %d steps of the run, whose learning rate ends at %.0f%% of what "
            "was asked for",
            warmup,
            max_steps,
            100 * max_steps / warmup,
        )
