"""Where a run is, settled once, before the ranks start, so that all of them agree; and where its files are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lisa_dist.config import Config
from lisa_dist.config.errors import UserError
from lisa_dist.config.paths import local_path


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run, and where in it each of its files is. Nothing is created by asking."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """Return the directory ``run.dir``, which is settled."""
        assert config.run.dir is not None, (
            "run.dir=null: the files of a run are asked for before its directory is known"
        )
        return cls(Path(config.run.dir))

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A row a step, and one an evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def layers(self) -> Path:
        """A row a period."""
        return self.path / "layers.jsonl"

    @property
    def summary(self) -> Path:
        """How the run ended, and with which figures."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The page with the plots."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """The results of ``lisa-dist evaluate``."""
        return self.path / "evaluation.json"

    @property
    def checkpoints(self) -> Path:
        """The folder with a folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The folder with all that an export needs but weights and tokenizer."""
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer that the run trained with, chat template included."""
        return self.path / "tokenizer"

    @property
    def faults(self) -> Path:
        """The folder with the batches of steps that were skipped."""
        return self.path / "faults"

    @property
    def logs(self) -> Path:
        """The folder with the ranks' logs, those of Slurm, and signs of life."""
        return self.path / "logs"

    @property
    def job_script(self) -> Path:
        """The script that was handed to Slurm."""
        return self.path / "job.sbatch"

    @property
    def tensorboard(self) -> Path:
        """The folder with TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The run's identity at Weights & Biases."""
        return self.path / "wandb" / "run_id.txt"

    def rank_log(self, rank: int) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank_{rank}.log"

    def holds_run(self) -> bool:
        """Whether a step was recorded or saved here; a start that failed before its first step may be repeated."""
        recorded = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return recorded or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))


def resolve_run_dir(config: Config) -> Config:
    """Return the configuration with ``run.dir`` settled as an absolute path; nothing is created.

    The default is ``runs/<run.name or date and time>`` in the current directory.
    """
    name = config.run.name or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    directory = local_path(config.run.dir or str(Path("runs") / name)).resolve()
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)))


def check_run_dir_is_free(config: Config) -> None:
    """Raise :class:`UserError` where training would write over a run that it does not continue."""
    run = RunDirectory.of(config)
    if config.checkpoint.resume == "none" and run.holds_run():
        raise UserError(
            f"run.dir={config.run.dir}: holds a run already, choose another directory or continue that run with "
            "checkpoint.resume=auto"
        )
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"run.dir={config.run.dir}: must be a directory, but is a file")
