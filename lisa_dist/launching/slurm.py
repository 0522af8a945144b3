"""``lisa-dist launch slurm``: writes, shows and submits the Slurm job script of a configuration.

One task is one rank, started by srun, so that Slurm's signals reach the ranks and their exit code reaches the
script. A run that stops on a signal leaves with code 75, and its job is put back into the queue.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lisa_dist.config import EXIT_DONE, EXIT_STOPPED, Config, LaunchConfig, UserError
from lisa_dist.config.checks import check_global_batch, check_grid, check_streamed
from lisa_dist.config.overrides import write_override
from lisa_dist.config.paths import followed, local_path
from lisa_dist.config.run_directory import RunDirectory, check_run_dir_is_free, resolve_run_dir
from lisa_dist.launching.inputs import check_read
from lisa_dist.launching.sweeps.comparison import EXIT_CODE_FILE, JOBS_FILE, RESUME
from lisa_dist.launching.sweeps.jobs import list_jobs, read_sweep, unfinished
from lisa_dist.runtime.files import make_folder

MARK = "# Written by lisa-dist launch slurm."
SECONDS_TO_SAVE = 300  # before the time limit, or a quarter of a short limit
SETTLED = ("run.dir", "checkpoint.resume", "launch")  # said by the script itself

# Where the ranks meet: an address that Slurm itself uses for the first node (a node's own name may mean 127.0.0.1
# there), and a port that two jobs on a node do not share.
RENDEZVOUS = """\
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
# srun does not take over the script's --cpus-per-task by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
"""
# A rank that ends leaves the others a minute to end as well, each with its own message and code; then they are
# killed. (--kill-on-bad-exit=1 would send TERM at once, and a rank that dies of it hides the code of the first.)
ENDING = ("--kill-on-bad-exit=0", "--wait=60")
REQUEUE = f"""\
# {EXIT_STOPPED}: the run has saved a checkpoint and stopped on a signal; requeued, the job goes on from there.
# There is no trap here: after scancel this script ends at once and nothing is requeued.
if [ $code = {EXIT_STOPPED} ]; then scontrol requeue "$job"; sleep 60; fi
exit $code
"""


@dataclass(frozen=True)
class Array:
    """The jobs of a sweep that one job array runs."""

    sweep_dir: Path
    jobs: list[int]  # lines of the file of jobs, counted from 0
    side_by_side: int | None


def run(config: Config, overrides: list[str], config_dir: str | None) -> int:
    """Write the job script of a run, which repeats ``overrides``, show it, and submit it unless ``launch.dry_run``.

    Raises:
        UserError: the configuration is not that of a job, what it reads is not there, or Slurm refuses it.
    """
    config = resolve_run_dir(config)
    check_run_dir_is_free(config)
    _look_for_inputs(config)
    _check_ranks(config)
    run = RunDirectory.of(config)
    kept = [text for text in overrides if not _is_settled(text)]
    script = run_script(config, kept, config_dir)
    path = followed(config.launch.script or str(run.job_script))
    _check_script(path)
    make_folder(run.logs, str(run.logs))
    return _hand_over(script, path, config.launch, f"lisa-dist: the run is in {run.path}")


def _look_for_inputs(config: Config) -> None:
    """Raise :class:`UserError` where what the job will read is not here, or say it where the job may find it elsewhere.

    A job may wait for hours before it could say so itself.
    """
    launch = config.launch
    try:
        check_read(config)
    except UserError as error:
        if not (launch.container or launch.setup or launch.dry_run):
            raise
        print(f"lisa-dist: {error} (on this machine; the job must find it where it runs)", file=sys.stderr)


def _check_ranks(config: Config) -> None:
    """Raise :class:`UserError` for what the ranks of the job would refuse; the user's own options may change them."""
    launch, parallel = config.launch, config.parallel
    if any(re.match(r"-(-nodes|-ntasks|N|n)", option) for option in launch.options):
        return
    ranks = (launch.nodes or parallel.nodes) * tasks_per_node(config)
    check_grid(ranks, parallel.replicate, parallel.ranks_of_replica(ranks))
    check_streamed(config, ranks)
    if config.checkpoint.resume == "none":
        check_global_batch(config.train, ranks)


def run_sweep(overrides: list[str], config_dir: str | None) -> int:
    """Write, show and submit one job array for every combination of the values that ``overrides`` give.

    Raises:
        UserError: as :func:`run`; or every job of the sweep is wrong.
    """
    space, config = read_sweep(overrides, config_dir)
    if config.sweep.trials:
        raise UserError(
            f"sweep.trials={config.sweep.trials}: Optuna chooses a job when others have ended, which an array can't "
            "wait for; list the values, or start lisa-dist train --multirun inside one job"
        )
    sweep_dir = Path(str(config.sweep.dir))
    left = unfinished(list_jobs(space, sweep_dir))
    if not left:
        print(f"lisa-dist: every job of {sweep_dir} has finished already")
        return EXIT_DONE
    array = Array(sweep_dir, [job.number for job in left], config.sweep.parallel if config.sweep.parallel > 1 else None)
    script = sweep_script(config, array, config_dir)
    path = followed(config.launch.script or str(sweep_dir / "sweep.sbatch"))
    _check_script(path)
    make_folder(sweep_dir / "logs", str(sweep_dir / "logs"))
    return _hand_over(script, path, config.launch, f"lisa-dist: the {len(left)} runs lie in {sweep_dir}")


def run_script(config: Config, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return the job script of one run: ``config.run.dir`` is settled, ``overrides`` are its other settings."""
    run = RunDirectory.of(config)
    header = _header(config, config.run.name or run.path.name, f"{_literal(run.logs)}/slurm-%j.log")
    logs = shlex.quote(f"{_literal(run.logs)}/slurm-%j.n%n.t%t.log")
    arguments = shlex.join([*overrides, RESUME, write_override("run.dir", str(run.path))])
    srun = _srun(config, run.path, config_dir, logs, arguments)
    return "\n".join([*header, RENDEZVOUS, srun, "code=$?", "job=$SLURM_JOB_ID", REQUEUE])


def sweep_script(config: Config, array: Array, config_dir: str | None = None) -> str:
    """Return the script of a job array over the lines of ``array.sweep_dir``'s file of jobs."""
    sweep_dir = array.sweep_dir
    numbers = ",".join(str(number) for number in array.jobs)
    limit = f"%{array.side_by_side}" if array.side_by_side else ""
    header = _header(config, sweep_dir.name, f"{_literal(sweep_dir)}/logs/slurm-%A_%a.log", f"--array={numbers}{limit}")
    report = shlex.join([sys.executable, "-m", "lisa_dist", "report", f"sweep.dir={sweep_dir}"])
    return "\n".join(
        [
            *header,
            RENDEZVOUS,
            "# A line is the folder of a job and its overrides, quoted for the shell.",
            f"mapfile -t lines < {shlex.quote(str(sweep_dir / JOBS_FILE))}",
            'eval "set -- ${lines[$SLURM_ARRAY_TASK_ID]}"',
            f'run_dir={shlex.quote(str(sweep_dir))}/"$1"',
            "shift",
            'mkdir -p "$run_dir/logs"',
            f'rm -f "$run_dir/{EXIT_CODE_FILE}"',
            _srun(config, sweep_dir, config_dir, '"${run_dir//%/%%}/logs/slurm-%j.n%n.t%t.log"', '"$@"'),
            "code=$?",
            f'echo $code > "$run_dir/{EXIT_CODE_FILE}"',
            report,
            'job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
            REQUEUE,
        ]
    )


def _header(config: Config, name: str, output: str, *more: str) -> list[str]:
    launch = config.launch
    tasks = tasks_per_node(config)
    options = [
        f"--job-name={name}",
        f"--nodes={launch.nodes or config.parallel.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--time={launch.time}",
        f"--signal=USR1@{min(SECONDS_TO_SAVE, limit_seconds(launch.time) // 4)}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={_literal(Path.cwd())}",
        f"--output={output}",
        *more,
    ]
    if launch.gpus_per_node:
        options.append(f"--gpus-per-node={launch.gpus_per_node}")
    options += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(launch, key)) is not None]
    for option in launch.options:
        if not option.startswith("-"):
            raise UserError(f"launch.options: {option} must be an option of sbatch, such as --mem=100G")
        if re.match(r"--time(?!-)|-t", option):
            raise UserError(f"launch.options: {option} is set by launch.time, by which the run is told when to save")
    # The last of two options counts, so the user's win.
    lines = [f"#SBATCH {_option(option)}" for option in [*options, *launch.options]]
    return ["#!/bin/bash", MARK, *lines, "", *(["# launch.setup", *launch.setup, ""] if launch.setup else [])]


def _option(text: str) -> str:
    """Return an option as sbatch reads it in a script: quoted as for the shell, on one line."""
    if "\n" in text:
        raise UserError(f"{text.splitlines()[0]}...: an option of sbatch must be one line")
    name, equals, value = text.partition("=")
    return f"{name}={shlex.quote(value)}" if equals else text


def _literal(path: Path) -> str:
    """Return a path in which Slurm sees no placeholder."""
    return str(path).replace("%", "%%")


def _srun(config: Config, folder: Path, config_dir: str | None, output: str, arguments: str) -> str:
    """Return the line that trains in ``folder``, in a container where one is chosen.

    ``output`` and ``arguments`` are quoted already.
    """
    container, options = config.launch.container, []
    folders = dict.fromkeys([str(Path.cwd()), str(folder)])
    more = ["--config-dir", str(Path(config_dir).resolve())] if config_dir else []
    program = [sys.executable if container is None else "python", "-m", "lisa_dist", "train", *more]
    if container is not None and container.endswith(".sif"):
        container = str(local_path(container))  # which no shell sees without quotes
        gpus = ["--nv"] if config.launch.gpus_per_node else []
        program = ["apptainer", "exec", *gpus, "--bind", ",".join(folders), container, *program]
    elif container is not None:
        mounts = ",".join(f"{name}:{name}" for name in folders)
        options = [f"--container-image={container}", f"--container-mounts={mounts}"]
        options.append(f"--container-workdir={Path.cwd()}")
    own = [*ENDING, "--open-mode=append", f"--output={output}", *map(shlex.quote, options)]
    return f"srun {' '.join(own)} \\\n    {shlex.join(program)} \\\n    {arguments}"


def tasks_per_node(config: Config) -> int:
    """Return the ranks on each node: as many as are asked for, else one a GPU, else ``parallel.nproc_per_node``.

    Raises:
        UserError: more ranks than GPUs are asked for.
    """
    launch, wanted = config.launch, config.parallel.nproc_per_node
    tasks = launch.tasks_per_node or launch.gpus_per_node or (1 if wanted == "auto" else int(wanted))
    if launch.gpus_per_node and tasks > launch.gpus_per_node:
        raise UserError(
            f"launch.tasks_per_node={tasks}: must be at most launch.gpus_per_node={launch.gpus_per_node}, for every "
            "rank has a GPU of its own"
        )
    return tasks


def limit_seconds(time: str) -> int:
    """Return a time limit of Slurm in seconds.

    Raises:
        UserError: the text is none of Slurm's forms: minutes, [days-]hours:minutes:seconds and so on.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        raise UserError(f"launch.time={time}: must be a time such as 90 (minutes), 24:00:00 or 2-12 (days-hours)")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def _is_settled(text: str) -> bool:
    key = text.partition("=")[0].lstrip("+")
    return any(f"{key}.".startswith(f"{name}.") for name in SETTLED)


def _check_script(path: Path) -> None:
    """Raise :class:`UserError` where the script would replace what this command has not written."""
    if path.is_dir() or path.is_symlink() or (path.exists() and MARK not in path.read_text(errors="replace")):
        raise UserError(f"launch.script={path}: must be a new file, or a script that this command wrote")


def _hand_over(script: str, path: Path, launch: LaunchConfig, where: str) -> int:
    """Write the script, show it, and submit it unless ``launch.dry_run``."""
    make_folder(path.parent, str(path.parent))
    try:
        path.write_text(script)
    except OSError as error:
        raise UserError(f"launch.script={path}: can't be written, {error.strerror}") from None
    print(script)
    print(where)
    if launch.dry_run:
        print(f"lisa-dist: not submitted; to submit it: {shlex.join(['sbatch', str(path)])}")
        return EXIT_DONE
    try:
        result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            f"launch.dry_run=false: there is no sbatch on this machine, submit {path} where Slurm is"
        ) from None
    if result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip()).replace("\n", "; ")
        if "Invalid job array specification" in reason:
            reason += " (MaxArraySize, which `scontrol show config` tells, must be above the number of jobs)"
        raise UserError(f"launch slurm: sbatch refused {path}, {reason}")
    sys.stderr.write(result.stderr)  # what the site has to say to a job that it takes
    job = result.stdout.strip().rpartition("\n")[2].partition(";")[0]
    print(f"lisa-dist: submitted as job {job}; to stop it: scancel {job}")
    return EXIT_DONE
