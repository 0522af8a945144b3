"""A sweep whose values Optuna chooses: each job by the losses of those that have finished by then.

The tree-structured Parzen estimator of Bergstra et al. (NeurIPS 2011), by the package optuna.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lisa_dist.config import UserError
from lisa_dist.config.sweeps import Interval, Space, varies
from lisa_dist.launching.sweeps.comparison import JOBS_FILE, JobRecord, write_comparison
from lisa_dist.launching.sweeps.jobs import OF_THE_SWEEP, jobs_text, unfinished
from lisa_dist.runtime.files import make_folder, write_atomically

STUDY_FILE = "optuna.log"  # Optuna's journal: what it has chosen, and the losses
STUDY_NAME = "sweep"
SPACE = "space"  # the study's attribute that tells what it searches


class OptunaSearch:
    """The study in ``sweep.dir``; its trial N is job N of the sweep.

    A trial is told its loss when its job has finished. Until then, and where the job fails, Optuna counts it as a
    poor one.
    """

    def __init__(self, space: Space, sweep_dir: Path) -> None:
        """Open the study, or begin one.

        Raises:
            UserError: optuna is missing, there is nothing to choose, or ``sweep_dir`` holds another sweep.
        """
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError(
                "sweep.trials: needs the package optuna; run pip install optuna, or list the values"
            ) from None
        self.space, self.sweep_dir = space, sweep_dir
        self.distributions = {key: _distribution(values) for key, values in space.items() if varies(values)}
        if not self.distributions:
            raise UserError("sweep.trials: there is nothing to choose; write KEY=interval(LOW,HIGH) or KEY=A,B")
        is_new = not (sweep_dir / STUDY_FILE).exists()
        if is_new and (sweep_dir / JOBS_FILE).exists():
            raise UserError(f"sweep.dir={sweep_dir}: holds a sweep that Optuna did not begin, choose another directory")
        make_folder(sweep_dir, f"sweep.dir={sweep_dir}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(sweep_dir / STUDY_FILE)))
        self.study = optuna.create_study(storage=storage, study_name=STUDY_NAME, load_if_exists=True)
        described = [str(values) for key, values in space.items() if not key.startswith(OF_THE_SWEEP)]
        if self.study.user_attrs.get(SPACE, described) != described:
            raise UserError(f"sweep.dir={sweep_dir}: holds a sweep over other values, choose another directory")
        self.study.set_user_attr(SPACE, described)

    def jobs(self, trials: int) -> Iterator[JobRecord]:
        """Yield the jobs that have not finished, then new ones until there are ``trials`` in all."""
        from optuna.samplers import TPESampler

        yield from unfinished(self.record())
        while (number := len(self.record())) < trials:
            # A seed of its own for each: a sweep that goes on later chooses as it would have without the pause.
            self.study.sampler = TPESampler(seed=number, constant_liar=True)
            self.study.ask(self.distributions)
            yield self.record()[-1]

    def record(self) -> list[JobRecord]:
        """List the jobs, compare them, tell the study the losses of those that have finished, and return them."""
        trials = self.study.get_trials(deepcopy=False)
        text = jobs_text(self.space, [self._overrides(trial.params) for trial in trials], self.sweep_dir)
        write_atomically(self.sweep_dir / JOBS_FILE, text)
        jobs = write_comparison(self.sweep_dir)
        for job, trial in zip(jobs, trials, strict=True):
            loss = job.final_loss if job.eval_loss is None else job.eval_loss
            if job.state == "finished" and loss is not None and not trial.state.is_finished():
                self.study.tell(job.number, loss)
        return jobs

    def _overrides(self, chosen: dict[str, Any]) -> list[str]:
        return [
            values.override(chosen[key]) if isinstance(values, Interval) else chosen.get(key, values[0])
            for key, values in self.space.items()
        ]


def _distribution(values: list[str] | Interval) -> Any:
    """Return Optuna's description of the values of a key."""
    from optuna import distributions

    if not isinstance(values, Interval):
        return distributions.CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return distributions.IntDistribution(values.low, values.high, log=values.log)
    return distributions.FloatDistribution(values.low, values.high, log=values.log)
