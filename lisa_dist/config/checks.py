"""What depends on several groups of keys: judged without torch, for the command line, the planner and the trainer.

A pair of options either works together, is refused here, or one of them has no effect, which is said here too.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Iterator

from lisa_dist.config import Config, SamplerConfig, TrainConfig
from lisa_dist.config.errors import UserError, as_written, check_at_least
from lisa_dist.config.optimization import PARTS
from lisa_dist.config.placement import is_block_major, stay_whole, stream_frozen
from lisa_dist.config.sampling import PROBE_KINDS


def check_combinations(config: Config) -> None:
    """Raise :class:`UserError` for options that exclude each other, whatever the model and the ranks."""
    _check_sampler(config.sampler)
    _check_non_block_modules(config)
    _check_something_trains(config)
    _check_packages(config)
    _check_quantization(config)
    _check_optimizer_shard(config)
    _check_step_in_backward(config)
    _check_block_major(config)
    if config.parallel.offload == config.parallel.activation_checkpointing == "auto":
        raise UserError(
            "parallel.offload=auto: shares out the memory that parallel.activation_checkpointing=auto would; set that "
            "to full, selective or none"
        )
    if config.checkpoint.keep_best and config.train.eval_every == 0:
        raise UserError(
            "checkpoint.keep_best=true: needs evaluations during training, and train.eval_every=0 makes none; "
            "set train.eval_every, the steps between them"
        )


def _check_sampler(sampler: SamplerConfig) -> None:
    """Refuse a probe that nobody can make."""
    if sampler.probe is not None and sampler.probe.kind not in PROBE_KINDS:
        raise UserError(
            f"sampler={sampler.name}: asks for the probe {sampler.probe.kind}, and there are {', '.join(PROBE_KINDS)}"
        )


def _check_non_block_modules(config: Config) -> None:
    """Refuse to draw what trains anyway, or what the update leaves alone."""
    if not config.sampler.draws_non_block_modules:
        return
    always = [part for part in ("embeddings", "head") if getattr(config.always_active, part)]
    if always:
        keys = " ".join(f"always_active.{part}=false" for part in always)
        raise UserError(f"sampler.non_block_modules=true: draws what would train in every period anyway; add {keys}")
    if config.update.adapters is not None:
        raise UserError(
            f"sampler.non_block_modules=true: update={config.update.name} has no adapters for embeddings and head; "
            "choose update=full_rank, or sampler.non_block_modules=false"
        )


def _check_something_trains(config: Config) -> None:
    """Refuse a choice by which no parameter ever trains."""
    sampler, always = config.sampler, config.always_active
    blocks = sampler.active_layers if sampler.listed_blocks is None else len(sampler.listed_blocks)
    if blocks == 0 and not sampler.trains_all_blocks and not (always.embeddings or always.norm or always.head):
        key = "sampler.active_layers=0" if sampler.listed_blocks is None else "sampler.blocks=[]"
        raise UserError(
            f"{key}: trains no block, and always_active.embeddings, .norm and .head are false, so nothing trains; "
            "choose blocks, or set one of these to true"
        )


def _check_packages(config: Config) -> None:
    """Refuse kernels, an optimizer or a logger whose package is missing, and a mode that Weights & Biases has not."""
    if config.model.kernels == "liger":
        check_package("liger_kernel", "model.kernels=liger", "liger-kernel")
    if config.optimizer.needs_package is not None:
        check_package(config.optimizer.needs_package, f"optimizer={config.optimizer.name}")
    if config.logger.name == "wandb":
        config.logger.wandb.with_variables(os.environ)
    if config.logger.name == "tensorboard":
        check_package("tensorboard", "logger=tensorboard")


def check_package(name: str, key: str, distribution: str | None = None) -> None:
    """Raise :class:`UserError` where a package that ``key`` needs can't be imported.

    Args:
        name: what is imported.
        key: what needs it, as the user writes it.
        distribution: what pip calls it, where that differs.
    """
    if importlib.util.find_spec(name) is None:
        package = distribution or name
        raise UserError(f"{key}: needs {package}, which is not installed; run pip install {package}")


def _check_quantization(config: Config) -> None:
    """Refuse what needs the numbers that quantised weights stand for."""
    if config.model.quantization == "none":
        return
    key = f"model.quantization={config.model.quantization}"
    if not config.update.supports_quantized_base:
        raise UserError(f"{key}: quantised weights can't be trained by update={config.update.name}, but by update=lora")
    if config.update.reads_base:
        raise UserError(f"{key}: {config.update.reads_base} reads the weights, which must then not be quantised")
    if config.sampler.probe is not None and PROBE_KINDS[config.sampler.probe.kind]:
        raise UserError(f"{key}: sampler={config.sampler.name} looks at weights, which must then not be quantised")


def _check_optimizer_shard(config: Config) -> None:
    """Refuse what ``parallel.optimizer_shard=world`` can't be had with."""
    if config.parallel.optimizer_shard != "world":
        return
    if not config.update.supports_sharded_masters:
        raise UserError(
            f"parallel.optimizer_shard=world: update={config.update.name} steps something else than parameters, which "
            "has no masters to shard; use parallel.optimizer_shard=replica"
        )
    if config.optimizer.in_backward:
        raise UserError("parallel.optimizer_shard=world: needs optimizer.in_backward=false, steps are gathered at once")
    if config.parallel.offload == "all":
        raise UserError("parallel.optimizer_shard=world: parallel.offload must be none or frozen, not all")


def _check_step_in_backward(config: Config) -> None:
    """Refuse what needs gradients after the backward pass where each parameter is stepped in it."""
    if not config.optimizer.in_backward:
        return
    if not config.update.supports_step_in_backward:
        raise UserError(
            f"optimizer.in_backward=true: update={config.update.name} needs a step's gradients all together; "
            "choose another update"
        )
    if config.train.on_nonfinite == "skip":
        raise UserError("optimizer.in_backward=true: can't leave steps out, so train.on_nonfinite must be stop")


def _check_block_major(config: Config, ranks_of_replica: int = 1) -> None:
    """Refuse ``parallel.block_major=true`` where nothing comes to one rank block by block, and what needs it."""
    parallel = config.parallel
    if parallel.offload_activations and not parallel.block_major:
        raise UserError(
            "parallel.offload_activations=true: goes with parallel.block_major=true alone, where inputs of blocks wait "
            "for all micro-batches of a step; set that too, or parallel.offload_activations=false"
        )
    if parallel.block_major and parallel.offload not in ("frozen", "auto"):
        raise UserError(
            f"parallel.block_major=true: goes with parallel.offload=frozen or auto, not with parallel.offload="
            f"{parallel.offload}; choose one of these, or parallel.block_major=false"
        )
    if parallel.block_major and not stream_frozen(parallel, config.precision, ranks_of_replica):
        raise UserError(
            "parallel.block_major=true: needs one rank, parallel.replicate=1, and precision.frozen to be "
            "precision.compute; set parallel.block_major=false"
        )


def check_grid(ranks: int, replicate: int, shard: int) -> None:
    """Raise :class:`UserError` where the replicas of the model, each over so many ranks, do not make up the ranks."""
    check_at_least("parallel.replicate", replicate, 1)
    if ranks % replicate:
        raise UserError(f"parallel.replicate={replicate}: must divide the number of ranks, {ranks}")
    if replicate * shard != ranks:
        raise UserError(
            f"parallel.shard={shard}: replicate x shard must equal the number of ranks, "
            f"but {replicate} x {shard} is not {ranks}"
        )


def check_global_batch(train: TrainConfig, ranks: int) -> None:
    """Raise :class:`UserError` where the global batch is no multiple of micro-batch x ranks.

    To be called at a fresh start; a run that goes on with another number of ranks need not fit.
    """
    at_once = train.micro_batch_size * ranks
    times = train.global_batch_size // at_once
    if train.global_batch_size % at_once:
        near = f"{times * at_once} and {(times + 1) * at_once}" if times else str(at_once)
        raise UserError(
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of train.micro_batch_size x "
            f"ranks, {train.micro_batch_size} x {ranks}; near are {near}"
        )


def check_validation(config: Config, has_validation: bool) -> None:
    """Raise :class:`UserError` where the held-out loss decides something and there are no rows to validate on."""
    if has_validation:
        return
    patience = config.train.early_stopping_patience
    for key, chosen in (
        (f"train.early_stopping_patience={patience}", patience > 0),
        ("checkpoint.keep_best=true", config.checkpoint.keep_best),
    ):
        if chosen:
            raise UserError(
                f"{key}: follows the held-out loss, and there is no validation data; set data.validation, a path or "
                "the fraction of the rows that is held out"
            )


def check_accumulation(config: Config, ranks: int) -> None:
    """Raise :class:`UserError` where a step within the backward pass would take several micro-batches of a rank."""
    at_once = config.train.micro_batch_size * ranks
    if config.optimizer.in_backward and config.train.global_batch_size > at_once:
        raise UserError(
            f"optimizer.in_backward=true: can't accumulate gradients, so train.global_batch_size="
            f"{config.train.global_batch_size} must be micro-batch x ranks, {at_once}"
        )


def check_streamed(config: Config, ranks: int) -> None:
    """Raise :class:`UserError` for what can't be had where one rank copies its frozen blocks from host memory."""
    parallel = config.parallel
    ranks_of_replica = parallel.ranks_of_replica(ranks)
    streams = stream_frozen(parallel, config.precision, ranks_of_replica)
    if parallel.offload == "auto" and not streams:
        raise UserError(
            "parallel.offload=auto: needs one rank, and precision.frozen to be precision.compute; choose "
            "parallel.offload=frozen"
        )
    _check_block_major(config, ranks_of_replica)
    if streams and config.model.router_aux_loss:
        raise UserError(
            f"parallel.offload={parallel.offload}: on one rank a block is computed again for its gradients, where the "
            "router's loss has none; set model.router_aux_loss=false, or parallel.offload=none or all"
        )


def options_without_effect(config: Config, ranks: int, has_validation: bool = True) -> list[str]:
    """Return a sentence for each option that was chosen and has no effect with the others chosen.

    Chosen is what differs from its default; besides, defaults that a user would rely on and that don't hold.
    ``has_validation`` says whether there are rows to validate on.
    """
    options = (_of_sampler(config), _of_optimization(config, has_validation), _of_placement(config, ranks))
    rows = itertools.chain(*options, _of_running(config))
    return [_sentence(config, keys.split(", "), why) for keys, idle, why in rows if idle]


IdleOption = tuple[str, bool, str]  # keys, whether they are chosen and have no effect, why


def _of_sampler(config: Config) -> Iterator[IdleOption]:
    sampler = config.sampler
    same_blocks = f"sampler={sampler.name} trains the same blocks in every period"
    yield "sampler.active_layers, sampler.period, sampler.seed", sampler.draws_once, same_blocks
    for name, why in sampler.idle_keys.items():
        yield f"sampler.{name}", _chosen(config, f"sampler.{name}"), why


def _of_optimization(config: Config, has_validation: bool) -> Iterator[IdleOption]:
    optimizer, scheduler, train = config.optimizer, config.scheduler, config.train
    chosen = functools.partial(_chosen, config)
    no_norm = "with optimizer.in_backward=true the norm of all gradients is never known, so none is clipped"
    yield "optimizer.grad_clip", optimizer.in_backward and optimizer.grad_clip > 0, no_norm
    undecayed = optimizer.decay_norms_and_biases and optimizer.weight_decay == 0
    yield "optimizer.decay_norms_and_biases", undecayed, "optimizer.weight_decay is 0"
    for part in optimizer.part_lr:
        drawn = part != "norm" and config.sampler.draws_non_block_modules
        frozen = not drawn and not getattr(config.always_active, part, True)
        yield f"optimizer.part_lr.{part}", frozen, f"always_active.{part} is false"
    has_all = len(optimizer.part_lr) == len(PARTS)
    yield "optimizer.lr", chosen("optimizer.lr") and has_all, "optimizer.part_lr has a learning rate for every part"
    never_freezes = f"sampler={config.sampler.name} never freezes a block that has trained"
    offloads = optimizer.state_on_freeze == "offload"
    yield "optimizer.state_on_freeze", offloads and config.sampler.draws_once, never_freezes
    constant = scheduler.name == "constant"
    yield "scheduler.min_lr_ratio", chosen("scheduler.min_lr_ratio") and constant, "scheduler=constant does not fall"
    yield "train.epochs", chosen("train.epochs") and train.max_steps is not None, "train.max_steps is given"
    stops = train.on_nonfinite == "stop"
    yield "train.nonfinite_limit", chosen("train.nonfinite_limit") and stops, "train.on_nonfinite=stop skips no step"
    for key in ("train.spike_window", "train.spike_limit"):
        yield key, chosen(key) and train.spike_factor == 0, "train.spike_factor is 0"
    for key in ("train.eval_every", "train.eval_batches"):
        yield key, chosen(key) and not has_validation, "there is no validation data; set data.validation"


def _of_placement(config: Config, ranks: int) -> Iterator[IdleOption]:
    parallel, train, always = config.parallel, config.train, config.always_active
    chosen = functools.partial(_chosen, config)
    whole_blocks = config.sampler.trains_all_blocks and config.update.trains_whole_blocks
    nothing_frozen = whole_blocks and always.embeddings and always.norm and always.head
    all_train = f"method={config.method} trains every parameter in every period"
    yield "parallel.offload", parallel.offload in ("frozen", "auto") and nothing_frozen, all_train
    block_major = is_block_major(parallel, train)
    all_again = "with parallel.block_major=true every block is computed again"
    yield "parallel.activation_checkpointing", chosen("parallel.activation_checkpointing") and block_major, all_again
    reads = parallel.offload == "auto" or (parallel.activation_checkpointing == "auto" and not block_major)
    unread = parallel.memory_limit is not None and not reads
    why_unread = "only parallel.activation_checkpointing=auto and parallel.offload=auto read it"
    yield "parallel.memory_limit", unread, why_unread
    one_micro_batch = train.global_batch_size <= train.micro_batch_size * ranks
    streams = stream_frozen(parallel, config.precision, parallel.ranks_of_replica(ranks))
    whole = streams or stay_whole(parallel, config.precision, parallel.ranks_of_replica(ranks))
    once_anyway = "gradients of whole weights are reduced once a step anyway"
    why_idle = once_anyway if whole else "a step is one micro-batch of each rank"
    for key in ("block_major", "offload_activations"):
        yield f"parallel.{key}", getattr(parallel, key) and one_micro_batch, "a step is one micro-batch"
    yield "parallel.defer_reduction", parallel.defer_reduction and (whole or one_micro_batch), why_idle
    ungathered = "weights that lie whole on each rank are never gathered"
    yield "parallel.reshard_after_forward", whole and not parallel.reshard_after_forward, ungathered
    alone = parallel.ranks_of_replica(ranks) == 1 and not streams
    yield "parallel.prefetch", chosen("parallel.prefetch") and alone, "a replica of one rank gathers nothing"
    one_replica = parallel.optimizer_shard == "world" and parallel.replicate == 1
    yield "parallel.optimizer_shard", one_replica, "with parallel.replicate=1 a replica is the world"
    yield "precision.frozen", chosen("precision.frozen") and nothing_frozen, all_train
    unreduced = whole and parallel.replicate == 1
    yield "precision.reduce", chosen("precision.reduce") and unreduced, "gradients of one rank are summed over no other"
    never_rounded = _why_nothing_is_rounded(config)
    yield "precision.on_freeze", chosen("precision.on_freeze") and never_rounded != "", never_rounded


def _why_nothing_is_rounded(config: Config) -> str:
    """Return why no parameter is rounded at a freeze, an empty string where some are."""
    if config.sampler.draws_once:
        return "no block that has trained is ever frozen"
    if not config.update.trains_whole_blocks:
        return "adapters keep their precision while they are frozen"
    same = config.precision.frozen == config.precision.active
    return "precision.frozen and precision.active are the same" if same else ""


def _of_running(config: Config) -> Iterator[IdleOption]:
    checkpoint, data = config.checkpoint, config.data
    only_last = "checkpoint.every=0 writes the last checkpoint alone"
    yield "checkpoint.full_every", _chosen(config, "checkpoint.full_every") and checkpoint.every == 0, only_last
    yield "checkpoint.async", checkpoint.in_background and checkpoint.every == 0, only_last
    for name in ("mode", "project", "entity", "tags"):
        key = f"logger.wandb.{name}"
        yield key, _chosen(config, key) and config.logger.name != "wandb", f"logger={config.logger.name} is chosen"
    packed = data.group_by_length and data.packing
    yield "data.group_by_length", packed, "packed sequences are filled to one length"
    varlen = config.model.attention == "varlen" and not data.packing
    yield "model.attention", varlen, "data.packing is false, and rows of one sample are attended to as with auto"
    is_text = data.format == "text"
    yield "data.train_on_prompt", data.train_on_prompt and is_text, "of data.format=text every token is trained"


def _sentence(config: Config, keys: list[str], why: str) -> str:
    named = ", ".join(f"{key}={as_written(_value(config, key))}" for key in keys)
    return f"{named}: {'has' if len(keys) == 1 else 'have'} no effect, {why}"


def _chosen(config: Config, key: str) -> bool:
    """Whether a key's value differs from its default."""
    group, _, name = key.rpartition(".")
    part = _value(config, group)
    return bool(getattr(part, name) != getattr(type(part)(), name))


def _value(config: Config, key: str) -> object:
    found: object = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found
