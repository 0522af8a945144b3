"""Where a run is, settled once, before the ranks start, so that all of them agree; and where its files are."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from lisa_dist.config import Config
from lisa_dist.config.errors import UserError
from lisa_dist.config.paths import followed, local_path


class RunDirectory:
    """The directory of one run, and where in it each of its files is. Nothing is created by asking."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the resolved configuration
        self.metrics = path / "metrics.jsonl"  # a row a step, and one an evaluation
        self.layers = path / "layers.jsonl"  # a row a period
        self.summary = path / "summary.json"  # how the run ended, its last and best losses, its speed and memory
        self.events = path / "events.jsonl"  # a row a resume, a fault, a roll-back, and answers to sample prompts
        self.plan = path / "plan.json"  # what ``lisa-dist plan run.dir=DIR`` predicts of the run
        self.report = path / "report.html"  # the page with the plots
        self.evaluation = path / "evaluation.json"  # the results of ``lisa-dist evaluate``
        self.checkpoints = path / "checkpoints"  # a folder a checkpoint
        self.model = path / "model"  # all that an export needs but weights and tokenizer
        self.tokenizer = path / "tokenizer"  # the one that the run trained with, chat template included
        self.faults = path / "faults"  # the batches of steps that were skipped
        self.logs = path / "logs"  # of the ranks and of Slurm, and signs of life
        self.lock = self.logs / "lock.json"  # who trains here; held while that process lives
        self.job_script = path / "job.sbatch"  # the script that was handed to Slurm
        self.tensorboard = path / "tensorboard"  # event files
        self.wandb_id = path / "wandb" / "run_id.txt"  # the run's identity at Weights & Biases

    @classmethod
    def of(cls, config: Config) -> RunDirectory:
        """Return the directory ``run.dir``, which is settled."""
        assert config.run.dir is not None, "the files of a run are asked for before run.dir is known"
        return cls(local_path(config.run.dir))

    def rank_log(self, rank: int) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank_{rank}.log"

    def heartbeat(self, rank: int) -> Path:
        """Return the file of a rank's sign of life, with the step and the part of it that the rank works on."""
        return self.logs / f"heartbeat_{rank}.json"

    def holds_run(self) -> bool:
        """Whether a step was recorded or saved here; a start that failed before its first step may be repeated."""
        return self._has_step() or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def foreign(self) -> Path | None:
        """Return what lies here that no run wrote and training would replace, None where there is nothing of the kind.

        A start that failed before its first step leaves the same names, and its lock.
        """
        if any(self.model.glob("*.safetensors")):  # a run keeps none there
            return self.model
        if self.holds_run() or self.lock.exists():
            return None
        names = [self.model, self.tokenizer, *([] if self._is_resolved() else [self.config])]
        words = {self.summary: '"exit_reason":', **dict.fromkeys((self.metrics, self.layers, self.events), '"step":')}
        names += [path for path, word in words.items() if path.is_file() and not _begins_with_key(path, word)]
        return next((path for path in names if path.exists()), None)

    def _is_resolved(self) -> bool:
        """Whether config.yaml has every group of keys, as a run writes it."""
        lines = self.config.read_text(encoding="utf-8", errors="replace").splitlines() if self.config.is_file() else []
        return {f"{field.name}:" for field in dataclasses.fields(Config)} <= {line.partition(" ")[0] for line in lines}

    def _has_step(self) -> bool:
        if not self.metrics.is_file():
            return False
        with self.metrics.open(encoding="utf-8", errors="replace") as rows:
            return any('"loss":' in row for row in rows)  # the evaluation before the first step has none


def _begins_with_key(record: Path, word: str) -> bool:
    """Whether a file of the record begins as a run writes it, or is empty as one that was cut short."""
    with record.open("rb") as file:
        start = file.read(64)
    return word.encode() in start or not start


def name_by_time() -> str:
    """Return the date and time as a name: to the millisecond, for several runs may start in one second."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]


def resolve_run_dir(config: Config) -> Config:
    """Return the configuration with ``run.dir`` settled as an absolute path; nothing is created.

    The default is ``runs/<run.name or date and time>`` in the current directory.
    """
    name = config.run.name or name_by_time()
    directory = followed(config.run.dir or str(Path("runs") / name))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(directory)))


def check_run_dir_is_free(config: Config) -> None:
    """Raise :class:`UserError` where training would write over a run that it does not continue."""
    run = RunDirectory.of(config)
    if config.checkpoint.resume == "none" and run.holds_run():
        raise UserError(
            f"run.dir={config.run.dir}: holds a run already, choose another directory or continue that run with "
            "checkpoint.resume=auto"
        )
    if (run.path.is_symlink() or run.path.exists()) and not run.path.is_dir():
        raise UserError(f"run.dir={config.run.dir}: must be a directory, but is a file, or a link to none")
    if (theirs := run.foreign()) is not None:
        raise UserError(
            f"run.dir={config.run.dir}: holds {theirs.name}, which no run wrote and training would replace; choose "
            "another directory, or move that"
        )
