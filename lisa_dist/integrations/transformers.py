"""LISA inside Hugging Face's ``Trainer`` and whatever is derived from it, TRL's ``SFTTrainer`` among them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.config import AlwaysActiveConfig, SamplerConfig, UserError
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.method.sampling import build_sampler
from lisa_dist.method.switch import RankSynchronizedSampler
from lisa_dist.models.layer_map import LayerMap, block_of, find_layers
from lisa_dist.runtime import distributed
from lisa_dist.sharding.fsdp2 import fsdp_groups, refresh_group, reshard_all

logger = logging.getLogger(__name__)

FROZEN = "_frozen_by_lisa"  # an attribute of the parameters that a callback froze, for now
RECORD = "lisa_active_layers"  # the key of a switch in the trainer's log history


class LisaCallback(TrainerCallback):
    """Trains a few sampled blocks at a time: ``Trainer(..., callbacks=[LisaCallback()])``.

    At the first step of each period the sampler draws, on rank 0 for all; the blocks that leave are frozen, their
    gradients and optimizer state are dropped; those that enter start with zero state. A resumed run draws again
    what was drawn before it, so it goes on with the set it stopped with. Each draw is in the log history. What was
    frozen when the optimizer was made stays so: of a PEFT model the adapters of active blocks train.

    The ``Trainer`` keeps storage as it is: all parameters stay in the dtype they were loaded in, and under FSDP2
    accelerate stores every one in fp32 that can be trained when training starts, so only gradients and optimizer
    state are saved. ``lisa-dist train`` saves the masters too.
    """

    def __init__(self, sampler: SamplerConfig | None = None, always_active: AlwaysActiveConfig | None = None) -> None:
        """Args:
        sampler: which blocks, how many and for how long; LISA's two for 20 steps where it is left out. Its seed is
            that of the ``TrainingArguments`` unless set.
        always_active: what trains outside the blocks; embeddings, final norm and head where it is left out.
        """
        self.config = UniformSamplerConfig() if sampler is None else sampler
        self.always_active = AlwaysActiveConfig() if always_active is None else always_active
        self.active_blocks: list[int] = []
        self.period = -1  # none drawn yet
        self._layers: LayerMap | None = None
        self._sampler: RankSynchronizedSampler | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Thaw what an earlier training of the model left frozen, because it was broken off."""
        _thaw(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the blocks, and freeze what never trains.

        Raises:
            UserError: the sampler would need calibration data, which a callback has none of; data parallelism would
                wait for the gradients of frozen blocks; or the optimizer lacks what an earlier training left frozen.
        """
        model: nn.Module = kwargs["model"]
        frozen = {id(parameter) for parameter in model.parameters() if hasattr(parameter, FROZEN)}
        if frozen and not frozen <= _stepped(kwargs["optimizer"]):
            raise UserError(
                "add_callback: a training of this model that was broken off left blocks frozen, which the optimizer "
                "lacks; give the LisaCallback in callbacks=[...] of the Trainer, which thaws them first"
            )
        if distributed.world_size() > 1 and not _is_sharded(model) and not args.ddp_find_unused_parameters:
            raise UserError(
                f"ddp_find_unused_parameters={args.ddp_find_unused_parameters}: must be True, or data parallelism "
                "would wait for the gradients of frozen blocks; set it so, or shard with FSDP2"
            )
        self._layers = find_layers(model)
        for name in _other_stacks(model, self._layers.blocks_path):
            logger.warning(
                "%s holds blocks too, which no draw reaches: they train in every period, unless you freeze them before "
                "(requires_grad_(False)); drawn are those of %s",
                *(name, self._layers.blocks_path),
            )
        self._sampler = RankSynchronizedSampler(build_sampler(self.config, len(self._layers.blocks), args.seed))
        probe = self.config.probe
        wanted = "learns from the gradients of every step" if self.config.observes_steps else ""
        if probe is not None:
            wanted = f"needs {'calibration data' if probe.batches else probe.kind.replace('_', ' ')}"
        if self.config.draws_non_block_modules:
            raise UserError(
                "sampler.non_block_modules=true: a callback draws blocks alone; use lisa-dist train method=lisa_lean"
            )
        if wanted:
            raise UserError(
                f"sampler={self.config.name}: {wanted}, and there are none in a callback; "
                "use lisa-dist train, or another sampler"
            )
        self.always_active.check_tied(self._layers.tied)
        self.period, self.active_blocks = -1, []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switch the active blocks where a period begins. Collective then: every rank."""
        assert self._sampler is not None, "the trainer calls on_train_begin first"
        period = state.global_step // self.config.period
        if period == self.period:
            return
        # More than one after a resume.
        drawn = {number: self._sampler.draw(number) for number in range(self.period + 1, period + 1)}
        self._tell_of_others(state.log_history, drawn)
        self.active_blocks = drawn[period]
        self.period = period
        self._switch(kwargs["model"], kwargs["optimizer"])
        if state.global_step % self.config.period == 0:  # else it was recorded before the resume
            record: Any = {"step": state.global_step, "lisa_period": period, RECORD: list(self.active_blocks)}
            state.log_history.append(record)
        logger.info("period %d, from step %d: blocks %s", period, state.global_step, self.active_blocks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Thaw what the callback froze: the next trainer of this model makes its optimizer of what is not frozen."""
        _thaw(kwargs["model"])
        self._refresh(kwargs["model"])

    def _tell_of_others(self, history: list[dict[str, Any]], drawn: dict[int, list[int]]) -> None:
        """Warn where a run that is resumed drew other blocks than are drawn for its periods now."""
        for row in history:
            now = drawn.get(row.get("lisa_period", -1))
            step = row.get("lisa_period", 0) * self.config.period
            if now is not None and (row["step"], row[RECORD]) != (step, now):
                logger.warning(
                    "resumed with another sampler, period or seed: period %d began at step %d with blocks %s, and is "
                    "reckoned to have begun at step %d with blocks %s",
                    *(row["lisa_period"], row["step"], row[RECORD], step, now),
                )
                return

    def _switch(self, model: nn.Module, optimizer: Any) -> None:
        """Freeze and thaw, and drop the state of what is frozen. No communication."""
        if _is_sharded(model):
            reshard_all(model)
        # What is not stepped, as the base below adapters, must have no gradient: it would count in the norm that clips.
        stepped = _stepped(optimizer)
        for name, parameter in model.named_parameters():
            trained = id(parameter) in stepped and self._trains(name)
            parameter.requires_grad_(trained)
            if not trained:
                parameter.grad = None
                optimizer.state.pop(parameter, None)
                if id(parameter) in stepped:
                    setattr(parameter, FROZEN, True)
        self._refresh(model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what was freed is in pieces of other sizes

    def _refresh(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                for group in fsdp_groups(module):
                    refresh_group(group)

    def _trains(self, name: str) -> bool:
        assert self._layers is not None
        part = self._layers.group_of(name)
        block = block_of(part)
        return bool(getattr(self.always_active, part)) if block is None else block in self.active_blocks


def _other_stacks(model: nn.Module, blocks_path: str) -> list[str]:
    """Return the lists of blocks that can train beside the one that is drawn from: an encoder's, a vision tower's."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{outer}.") for outer in (blocks_path, *found))
        if not isinstance(module, nn.ModuleList) or inside or blocks_path.startswith(f"{name}."):
            continue
        is_stack = any(True for part in module for _ in part.children())  # and no list of single layers
        if is_stack and any(parameter.requires_grad for parameter in module.parameters()):
            found.append(name)
    return found


def _thaw(model: nn.Module) -> None:
    """Thaw what a callback froze."""
    for parameter in model.parameters():
        if hasattr(parameter, FROZEN):
            parameter.requires_grad_(True)
            delattr(parameter, FROZEN)


def _stepped(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())
