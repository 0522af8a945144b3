"""What depends on several groups of keys: judged without torch, for the command line, the planner and the trainer.

A pair of options either works together, is refused here, or one of them has no effect (see idle_options.py).
"""

from __future__ import annotations

import importlib.util
import os

from lisa_dist.config import Config, SamplerConfig, TrainConfig
from lisa_dist.config.errors import UserError, check_at_least
from lisa_dist.config.placement import stream_frozen
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
