"""Keys of ``checkpoint.*``, ``run.*`` and ``logger.*``: what a run leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lisa_dist.config.errors import check_choice, check_choices, check_minimums

WANDB_MODES = ["online", "offline", "disabled"]  # as Weights & Biases calls them


class CheckpointConfig:
    every: int = 0  # optimizer steps between checkpoints; 0: none but the last
    keep: int = 3  # newest checkpoints kept, and those that they need; 0: all
    keep_best: bool = False  # keep that of the lowest held-out loss besides, saved when it is evaluated
    full_every: int = 1  # every n-th checkpoint is full, those between hold the weights that changed
    resume: str = "none"  # none, or auto: go on from the newest complete checkpoint of the run directory
    new_data: bool = False  # go on although the data are other ones than the checkpoint's, at their start
    on_error: str = "stop"  # a checkpoint that can't be written: stop, or warn and go on

    def __post_init__(self) -> None:
        check_minimums("checkpoint", self, every=0, keep=0, full_every=1)
        check_choices("checkpoint", self, resume=["none", "auto"], on_error=["stop", "warn"])

    @property
    def in_background(self) -> bool:
        """``checkpoint.async``: stage to host memory and write while training goes on."""
        return bool(getattr(self, "async"))


# ``async`` is a keyword of Python, so the field of that name is added by hand, outside __init__.
CheckpointConfig.__annotations__["async"] = "bool"
_MEANING = "stage to host memory and write while training goes on"
_FIELD = field(default=False, init=False, repr=False, compare=False, metadata={"meaning": _MEANING})
setattr(CheckpointConfig, "async", _FIELD)
CheckpointConfig = dataclass(CheckpointConfig)  # type: ignore[misc]


@dataclass
class RunConfig:
    dir: str | None = None  # where everything of a run is; null: runs/<run.name or date and time>
    name: str | None = None  # for directory, loggers and job; null: run.dir's own, else date and time


@dataclass
class WandbConfig:
    mode: str | None = None  # online, offline, disabled; null: WANDB_MODE, else online
    project: str | None = None  # the project that the run belongs to; null: WANDB_PROJECT, else lisa-dist
    entity: str | None = None  # the team or account; null: WANDB_ENTITY, else the account's default one
    tags: list[str] = field(default_factory=list)  # labels of the run; none: those of WANDB_TAGS

    def __post_init__(self) -> None:
        check_choices("logger.wandb", self, mode=WANDB_MODES)

    def with_variables(self, environment: Mapping[str, str]) -> WandbConfig:
        """Return these settings with W&B's own variables, then the defaults, in place of what is null.

        Raises:
            UserError: WANDB_MODE is none of W&B's modes.
        """
        mode = self.mode or environment.get("WANDB_MODE") or "online"
        check_choice("logger.wandb.mode" if self.mode else "WANDB_MODE", mode, WANDB_MODES)
        project = self.project or environment.get("WANDB_PROJECT") or "lisa-dist"
        tags = self.tags or [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",") if tag.strip()]
        entity = self.entity or environment.get("WANDB_ENTITY")
        return replace(self, mode=mode, project=project, entity=entity, tags=tags)


@dataclass
class LoggerConfig:
    name: str = "none"  # beside metrics.jsonl and the progress bar: none, wandb, tensorboard
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check_choices("logger", self, name=["none", "wandb", "tensorboard"])
