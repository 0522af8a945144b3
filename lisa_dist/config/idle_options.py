"""Options that were chosen and have no effect with the others chosen, a sentence each; without torch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from lisa_dist.config import Config
from lisa_dist.config.errors import as_written
from lisa_dist.config.optimization import PARTS
from lisa_dist.config.placement import is_block_major, stay_whole, stream_frozen

IdleOption = tuple[str, bool, str]  # keys, whether they are chosen and have no effect, why


def options_without_effect(config: Config, ranks: int, has_validation: bool = True) -> list[str]:
    """Return a sentence for each option that was chosen and has no effect with the others chosen.

    Chosen is what differs from its default; besides, defaults that a user would rely on and that don't hold.
    ``has_validation`` says whether there are rows to validate on.
    """
    options = (_of_sampler(config), _of_optimization(config, has_validation), _of_placement(config, ranks))
    rows = itertools.chain(*options, _of_running(config))
    return [_sentence(config, keys.split(", "), why) for keys, idle, why in rows if idle]


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
