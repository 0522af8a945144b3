"""Where rows go beside the run directory: Weights & Biases or TensorBoard."""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lisa_dist.config import Config, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.distributed import is_main
from lisa_dist.runtime.files import naming
from lisa_dist.runtime.redaction import hide_secrets_in

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter  # needs the optional package tensorboard

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the rows that metrics.jsonl takes."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row; its ``step`` says when, its other numbers are curves."""

    def cut_after(self, step: int) -> None:
        """The run goes on from the checkpoint of ``step``; rows of later steps come again."""

    def close(self) -> None:
        """Send what is left."""


class WandbSink:
    """Sends rows to Weights & Biases; offline they are kept below the run directory for ``wandb sync``."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        import wandb  # slow, and of no use to other loggers

        options = config.logger.wandb.with_variables(os.environ)
        mode: Any = options.mode  # which is checked to be one that wandb has
        try:
            self.run = wandb.init(
                project=options.project,
                entity=options.entity,
                tags=options.tags,
                mode=mode,
                name=config.run.name or os.environ.get("WANDB_NAME") or run.path.name,
                id=_wandb_id(run.wandb_id),
                resume="allow" if options.mode == "online" else None,
                dir=str(run.path),
                config=public_config(config),
                settings=wandb.Settings(console="off", silent=options.mode != "online"),
            )
            # A row of a smaller step than the last one's is dropped there, but for a step that is a metric of its own.
            self.run.define_metric("step", hidden=True)
            self.run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:
            raise UserError(
                f"logger.wandb.mode={options.mode}: Weights & Biases said: {error}; "
                "`wandb login` helps, or logger.wandb.mode=offline, which needs no account"
            ) from error
        entity = f", entity {options.entity}" if options.entity else ""
        logger.info("Weights & Biases: %s, project %s%s, run %s", options.mode, options.project, entity, self.run.id)

    def log(self, row: dict[str, Any]) -> None:
        self.run.log({**numbers_of(row), "step": row["step"]})

    def cut_after(self, step: int) -> None:
        """What is sent stays, and what comes again is drawn beside it."""

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """Writes event files to ``tensorboard/`` in the run directory."""

    def __init__(self, run: RunDirectory, first_step: int) -> None:
        self.folder = str(run.tensorboard)
        self.writer = self._begin(first_step)

    def log(self, row: dict[str, Any]) -> None:
        with naming(Path(self.folder)):
            for key, value in numbers_of(row).items():
                self.writer.add_scalar(key, value, row["step"])

    def cut_after(self, step: int) -> None:
        """Hide the points of later steps."""
        self.writer.close()
        self.writer = self._begin(step)

    def close(self) -> None:
        self.writer.close()

    def _begin(self, step: int) -> SummaryWriter:
        """Begin a file that hides what the ones before it hold of steps after ``step``."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, purge_step=step + 1)


def build_sink(config: Config, run: RunDirectory, first_step: int = 0) -> Sink | None:
    """Return the sink of ``config.logger``; None for ``logger=none`` and on ranks other than 0.

    Where a run goes on after ``first_step`` steps, later points of its first attempt are hidden.

    Raises:
        UserError: the service refuses, or its package is missing.
    """
    if is_main() and config.logger.name == "wandb":
        return WandbSink(config, run)
    if is_main() and config.logger.name == "tensorboard":
        return TensorBoardSink(run, first_step)
    return None


def public_config(config: Config) -> dict[str, Any]:
    """Return the configuration as a dict without secrets, and without ``launch``, whose shell lines may hold them."""
    values = dataclasses.asdict(config)
    del values["launch"]
    return hide_secrets_in(values)


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row that make a curve, nested ones as ``outer/inner``."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            numbers |= {f"{key}/{inner}": number for inner, number in numbers_of(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            numbers[key] = value
    return numbers


def _wandb_id(file: Path) -> str:
    """Return the run's identity there, kept below the run directory so that a resumed run stays one run."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:12])
    return file.read_text().strip()
