"""From a configuration to a run that is ready for its next step."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lisa_dist.checkpoint.description import check_same_architecture, was_untied, write_description, write_tokenizer
from lisa_dist.checkpoint.differences import changed_settings, table_of
from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.checkpoint.protocol import remove_leftovers
from lisa_dist.checkpoint.restore import newest_complete, restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress, read_state
from lisa_dist.config import Config, TrainConfig, UserError
from lisa_dist.config.checks import check_global_batch, check_validation
from lisa_dist.config.run_directory import RunDirectory, check_run_dir_is_free, resolve_run_dir
from lisa_dist.data.batches import GlobalBatches, MicroBatch
from lisa_dist.data.prepare import PreparedData, fingerprint, hash_of_rows, prepare_data
from lisa_dist.data.preview import show_preview
from lisa_dist.data.sequences import Sequences
from lisa_dist.method.module import TrainModule, build_train_module, load_initial_weights
from lisa_dist.models.architecture import read_architecture
from lisa_dist.models.inspection import pretrained_architecture
from lisa_dist.runtime import distributed
from lisa_dist.runtime.environment import restart_count
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.heartbeat import Heartbeat
from lisa_dist.runtime.redaction import public_yaml
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.telemetry.recorder import Recorder
from lisa_dist.telemetry.run_lock import hold_run
from lisa_dist.training.announcement import announce_run, warn_of_data, warn_of_settings
from lisa_dist.training.generation import Answerer
from lisa_dist.training.limits import check_positions, check_streaming, check_tokens, open_tokenizer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run in progress: the model with its data, its place and its record."""

    config: Config
    train_module: TrainModule
    tokenizer: PreTrainedTokenizerBase
    batches: GlobalBatches
    validation: GlobalBatches | None
    max_steps: int
    progress: Progress
    recorder: Recorder
    checkpoints: CheckpointSaver
    heartbeat: Heartbeat

    @cached_property
    def answerer(self) -> Answerer:
        """What answers sample prompts. The first use is collective: every rank."""
        return Answerer(self.train_module)

    def coming_micro_batches(self, count: int) -> list[MicroBatch]:
        """Return this rank's next ``count`` micro-batches, not yet trained on."""
        return self.batches.coming_micro_batches(self.progress.sequences, count, self.progress.place_of)


def open_run_directory(config: Config, start: ExitStack) -> Config:
    """Fix ``run.dir`` and, at a fresh start, write config.yaml there. Collective: rank 0 acts, every rank learns.

    Where the elastic agent restarted a rank, the run is resumed, whatever ``checkpoint.resume`` says. Until ``start``
    ends, no other start may train there.

    Raises:
        UserError: a run is there that is alive or not to be resumed, or the directory can't be written.
    """

    restarted = max(distributed.gather_objects(restart_count())) > 0

    def claim() -> Config:
        settled = copy.deepcopy(resolve_run_dir(config))
        if restarted:
            settled.checkpoint.resume = "auto"
        check_run_dir_is_free(settled)
        run = RunDirectory.of(settled)
        start.enter_context(hold_run(run))
        check_run_dir_is_free(settled)  # still: another start may have ended there while this one waited
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_leftovers(run.checkpoints)
            if not run.holds_run():  # a run that is there keeps its own until it goes on
                write_atomically(run.config, public_yaml(settled))
        except OSError as error:
            raise UserError(f"run.dir={run.path}: can't be written ({error.strerror})") from error
        return settled

    return distributed.on_rank_zero(claim)


def forget_start(config: Config) -> None:
    """Remove config.yaml where a first start was refused: the next one must not take its settings for a run's."""
    run = RunDirectory.of(config)
    if distributed.is_main() and not run.holds_run():
        run.config.unlink(missing_ok=True)


def prepare_run(config: Config, dims: ParallelDims) -> Run:
    """Read the data, build the model, and restore the newest checkpoint or load the weights to start from.

    Collective: every rank.

    Raises:
        UserError: the configuration does not fit the model, the data or the ranks.
    """
    started = time.monotonic()
    device = distributed.device()
    directory = RunDirectory.of(config).checkpoints
    with distributed.longer_timeout(config.parallel.timeout):
        newest = newest_complete(directory) if config.checkpoint.resume == "auto" else None
        if newest is None:
            check_global_batch(config.train, dims.data_ranks)
        architecture = open_architecture(config)
    tokenizer = open_tokenizer(config.model)
    order_seed = config.train.seed
    if newest is not None:  # that of the run's first start
        with distributed.longer_timeout(config.parallel.timeout):
            order_seed = distributed.on_rank_zero(lambda: read_state(newest)["progress"]["order_seed"])
    data = prepare_data(config.data, tokenizer, order_seed)  # waits by itself, as long as it takes
    check_validation(config, data.validation is not None)
    with distributed.longer_timeout(config.parallel.timeout):
        described = distributed.on_rank_zero(lambda: fingerprint(config.data, data, tokenizer))
        for sequences in filter(None, (data.train, data.validation)):
            check_tokens(sequences, tokenizer, architecture.vocab_size)
    warn_of_data(config, architecture, data.train)
    show_preview(config.data, data, tokenizer)
    pad = int(tokenizer.pad_token_id or 0)
    batches = make_batches(config, dims, data.train, pad, order_seed)
    validation = None if data.validation is None else make_batches(config, dims, data.validation, pad, order_seed)
    longest = max(one.longest_micro_batch()["input_ids"].shape[1] for one in (batches, validation) if one is not None)
    with distributed.longer_timeout(config.parallel.timeout):
        distributed.on_rank_zero(lambda: check_positions(config.model, architecture, longest))
        evaluated = distributed.on_rank_zero(lambda: describe_evaluated(validation, config.train.eval_batches))
    check_streaming(config, architecture, dims.num_ranks)
    train_module = build_train_module(config, architecture, dims)
    settings = public_yaml(config)
    checkpoints = CheckpointSaver(train_module, directory, settings)
    progress = Progress(order_seed=order_seed, data=described, evaluated=evaluated)
    with distributed.longer_timeout(config.parallel.timeout):
        if newest is None:
            distributed.on_rank_zero(lambda: settle_run_directory(config, settings, tokenizer))
            load_initial_weights(train_module, device)
        else:
            progress = go_on(train_module, checkpoints, newest, device, described)
            look_for_the_best_anew(progress, evaluated)
            distributed.on_rank_zero(lambda: settle_run_directory(config, settings, tokenizer))
    max_steps = planned_steps(config.train, batches, progress)
    announce_run(config, train_module, data, batches, max_steps, progress)
    warn_of_settings(config, dims.data_ranks, validation is not None, max_steps)
    heartbeat = Heartbeat(RunDirectory.of(config), config.parallel.timeout, max_steps)
    recorder = make_recorder(config, max_steps, len(train_module.store.layers.blocks), started, progress, heartbeat)
    recorder.summary |= rows_of(data)
    return Run(
        config, train_module, tokenizer, batches, validation, max_steps, progress, recorder, checkpoints, heartbeat
    )


def make_recorder(
    config: Config, max_steps: int, num_blocks: int, started: float, progress: Progress, heartbeat: Heartbeat
) -> Recorder:
    """Return the recorder of a run that goes on from ``progress``; ``started`` is this start's ``time.monotonic()``."""
    recorder = Recorder(
        config,
        max_steps,
        num_blocks=num_blocks,
        started=started,
        first_step=progress.step,
        resumed_from=progress.resumed_from,
        evaluated_since=progress.evaluated_since,
        doing=heartbeat.doing,
    )
    recorder.summary |= {"skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}
    return recorder


def open_architecture(config: Config) -> PretrainedConfig:
    """Return the architecture to build; where the run starts, look at its weights and note what an export will need.

    Collective: every rank.

    Raises:
        UserError: a file of the model is damaged, or does not fit the others.
    """
    resumes = config.checkpoint.resume == "auto"
    if resumes and distributed.on_rank_zero(lambda: bool(list_checkpoints(RunDirectory.of(config).checkpoints))):
        architecture = read_architecture(config.model)
        distributed.on_rank_zero(lambda: check_same_architecture(RunDirectory.of(config), config.model, architecture))
        if distributed.on_rank_zero(lambda: was_untied(RunDirectory.of(config))):
            architecture.tie_word_embeddings = False
        return architecture
    architecture = pretrained_architecture(config.model, config.precision.frozen)
    distributed.on_rank_zero(lambda: write_description(RunDirectory.of(config), config.model, architecture))
    return architecture


def settle_run_directory(config: Config, settings: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what the run starts or goes on with, its settings and tokenizer, once nothing of it can be refused."""
    run = RunDirectory.of(config)
    write_atomically(run.config, settings)
    write_tokenizer(run.tokenizer, config.model, tokenizer)


def describe_evaluated(validation: GlobalBatches | None, limit: int | None) -> str | None:
    """Return which rows held-out losses are of: a hash of all, and how many of the first are evaluated."""
    if validation is None:
        return None
    return f"{hash_of_rows(validation.sequences.rows)}, {validation.num_validated(limit)} sequences"


def planned_steps(config: TrainConfig, batches: GlobalBatches, progress: Progress) -> int:
    """Return after how many optimizer steps the run ends; with epochs, what is left of the data decides."""
    if config.max_steps is not None:
        return config.max_steps
    return progress.step + batches.steps(config.epochs, progress.sequences)


def rows_of(data: PreparedData) -> dict[str, Any]:
    """Return what summary.json says of the rows: ``rows``, and ``validation_rows`` where they have a source."""
    counts = {"rows": data.counts, "validation_rows": data.validation_counts}
    return {name: found.rows for name, found in counts.items() if found is not None}


def make_batches(
    config: Config, dims: ParallelDims, sequences: Sequences, pad_token_id: int, seed: int | None = None
) -> GlobalBatches:
    """Return this rank's view of the global batches over ``sequences``, ordered by ``seed`` or ``train.seed``."""
    return GlobalBatches(
        sequences=sequences,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.train.seed if seed is None else seed,
        rank=dims.data_rank,
        num_ranks=dims.data_ranks,
        pad_token_id=pad_token_id,
        fixed_length=config.data.packing,
        group_by_length=config.data.group_by_length and not config.data.packing,
    )


def go_on(
    train_module: TrainModule, checkpoints: CheckpointSaver, newest: Path, device: torch.device, data: dict[str, Any]
) -> Progress:
    """Fill the model from the newest complete checkpoint, and say what differs from it. Collective: every rank.

    Args:
        train_module: whose model is filled.
        checkpoints: what the run's further checkpoints build on.
        newest: the checkpoint.
        device: where shards lie.
        data: the fingerprint of the data that the run goes on with.

    Raises:
        UserError: the checkpoint is that of another model or method, or of other data.
    """
    progress, state = restore_checkpoint(train_module, newest, device, data)
    checkpoints.continue_from(newest, state)
    progress.resumed_from.append(progress.step)
    logger.info("going on from %s", newest)
    changes = changed_settings(newest, checkpoints.config_yaml)
    if changes and distributed.is_main():
        logger.info("%s", table_of(changes))
    return progress


def look_for_the_best_anew(progress: Progress, evaluated: str | None) -> None:
    """Forget the best held-out loss, and say so, where it was of other rows than those that are evaluated now."""
    if progress.forget_best_of_others(evaluated) and distributed.is_main():
        logger.warning(
            "the held-out loss is of other rows than before (data.validation, train.eval_batches, or the number of "
            "ranks), so the best one is looked for anew"
        )
