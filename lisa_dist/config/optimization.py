"""Keys of ``optimizer.*``, ``scheduler.*`` and ``train.*``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lisa_dist.config.errors import (
    UserError,
    check_above_zero,
    check_at_least,
    check_choice,
    check_choices,
    check_fraction,
    check_minimums,
)

PARTS = ("blocks", "embeddings", "norm", "head")  # of a model, for learning rates of their own


@dataclass
class OptimizerConfig:
    """What every optimizer shares, and what it needs; an optimizer's own keys are in its subclass."""

    needs_package: ClassVar[str | None] = None  # beyond those that lisa-dist installs

    name: str = "adamw"  # the optimizer; optimizer=NAME sets it together with what belongs to it
    lr: float = 2e-5  # the learning rate after the warm-up
    part_lr: dict[str, float] = field(default_factory=dict)  # in place of lr for blocks, embeddings, norm or head
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # decay of the two moments
    weight_decay: float = 0.0  # of every trained parameter that is no norm's and no bias
    decay_norms_and_biases: bool = False  # of these too; transformers' Trainer leaves them out
    grad_clip: float = 1.0  # largest global gradient norm; 0 turns clipping off
    in_backward: bool = False  # update each block inside the backward pass
    state_on_freeze: str = "discard"  # discard (LISA) or offload: keep moments in host memory until the block returns

    def __post_init__(self) -> None:
        check_choices("optimizer", self, state_on_freeze=["discard", "offload"])
        check_minimums("optimizer", self, lr=0, weight_decay=0, grad_clip=0)
        for part, lr in self.part_lr.items():
            check_choice("optimizer.part_lr", part, PARTS)
            check_at_least(f"optimizer.part_lr.{part}", lr, 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={self.betas}: must be two numbers from 0 up to, but not, 1")

    def lr_of(self, part: str) -> float:
        """Return the learning rate after the warm-up of one of ``PARTS``."""
        return self.part_lr.get(part, self.lr)

    def check_tied(self, tied: bool) -> None:
        """Raise :class:`UserError` where tied weights would have two learning rates; theirs is the embeddings'."""
        if tied and "head" in self.part_lr and self.part_lr["head"] != self.lr_of("embeddings"):
            raise UserError(
                f"optimizer.part_lr.head={self.part_lr['head']}: this model ties its head to its embeddings, whose "
                f"learning rate is {self.lr_of('embeddings')}; set optimizer.part_lr.embeddings, it holds for both"
            )


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW: two moments, in the dtype of the masters."""

    name: str = "adamw"
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimums("optimizer", self, eps=0)


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW with both moments in 8 bits, by torchao."""

    needs_package: ClassVar[str | None] = "torchao"

    name: str = "adamw8bit"


@dataclass
class LionConfig(OptimizerConfig):
    """Lion: one moment, and steps that are the signs of a mean of it and the gradient."""

    name: str = "lion"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # share of the moment in a step, and its decay


OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamWConfig,
    "adamw8bit": AdamW8bitConfig,
    "lion": LionConfig,
}


@dataclass
class SchedulerConfig:
    name: str = "cosine"  # cosine, linear, constant
    warmup_steps: int = 0  # optimizer steps over which the learning rate rises from 0
    min_lr_ratio: float = 0.0  # share of the learning rate that it falls to, where a step after the last would be

    def __post_init__(self) -> None:
        check_choices("scheduler", self, name=["cosine", "linear", "constant"])
        check_minimums("scheduler", self, warmup_steps=0)
        check_fraction("scheduler.min_lr_ratio", self.min_lr_ratio)


@dataclass
class TrainConfig:
    max_steps: int | None = None  # optimizer steps; null: from epochs
    epochs: float = 1.0  # passes over the data where max_steps is null
    global_batch_size: int = 8  # sequences an optimizer step
    micro_batch_size: int = 1  # sequences a forward pass of one rank
    seed: int = 0  # of the data order, of random weights and of dropout
    eval_every: int = 0  # steps between validations; 0: none
    eval_batches: int | None = None  # micro-batches a rank of a validation; null: all
    early_stopping_patience: int = 0  # evaluations without a better held-out loss until the run ends; 0: off
    log_every: int = 1  # steps between rows of metrics.jsonl; a step that may end in a checkpoint has one anyhow
    on_nonfinite: str = "stop"  # a loss or gradient that is not finite: stop, or skip the step
    nonfinite_limit: int = 20  # steps that may be skipped for it in a run
    spike_factor: float = 0.0  # a loss so many times the recent median: back to the last checkpoint; 0: off
    spike_window: int = 50  # losses that the median is of
    spike_limit: int = 3  # times that a run may go back, each time without the batch that led to it
    sample_prompts: int = 0  # prompts answered before and after training: held-out ones, where rows are held out
    sample_every: int = 0  # steps between further answers to them; 0: none

    def __post_init__(self) -> None:
        check_above_zero("train.epochs", self.epochs)
        check_choices("train", self, on_nonfinite=["stop", "skip"])
        check_minimums("train", self, max_steps=1, global_batch_size=1, micro_batch_size=1, log_every=1, spike_window=1)
        check_minimums("train", self, eval_every=0, eval_batches=1, nonfinite_limit=0, spike_limit=0)
        check_minimums("train", self, sample_prompts=0, sample_every=0, early_stopping_patience=0, seed=0)
        if self.early_stopping_patience > 0 and self.eval_every == 0:
            raise UserError(
                f"train.early_stopping_patience={self.early_stopping_patience}: counts evaluations during training, "
                "and train.eval_every=0 makes none; set train.eval_every, the steps between them"
            )
        if self.sample_every > 0 and self.sample_prompts == 0:
            raise UserError(
                f"train.sample_every={self.sample_every}: needs train.sample_prompts, the number of prompts"
            )
        if self.spike_factor != 0:
            check_minimums("train", self, spike_factor=1)
