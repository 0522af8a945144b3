"""The command line: ``lisa-dist COMMAND [key=value ...]``, one thin function a command.

Each imports what it runs when it is called: importing torch takes seconds, which neither a mistake in
the configuration nor ``--help`` should have to wait for.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

from lisa_dist import __version__
from lisa_dist.config import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Config,
    GenerateConfig,
    OutOfMemoryError,
    UserError,
)
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.config_file import file_overrides, split_words
from lisa_dist.config.errors import check_choice
from lisa_dist.config.loading import GROUPS, group_choices, load, load_run, resume_run, to_yaml
from lisa_dist.config.other_trainers import key_here
from lisa_dist.config.overrides import parse_overrides, write_override
from lisa_dist.config.paths import local_path
from lisa_dist.config.prompts import check_output, split_literals
from lisa_dist.config.reference import keys_of
from lisa_dist.config.run_directory import RunDirectory, resolve_run_dir
from lisa_dist.runtime.environment import environment_rank, expand_segments, has_ranks
from lisa_dist.runtime.signals import end_at_signals, ignore_stop_signals, install_stop_handlers, stops_within

Function = Callable[[Config], int]


def explaining_memory(function: Function) -> Function:
    """Let a command that runs out of memory end in one sentence; ``train`` does it itself, it knows its step."""

    @functools.wraps(function)
    def run(config: Config) -> int:
        from lisa_dist.telemetry.out_of_memory import explaining_out_of_memory

        with explaining_out_of_memory(config, lambda: function.__name__, log=False):
            return function(config)

    return run


def train(config: Config) -> int:
    """Trains; where no model is chosen, a small demonstration."""
    from lisa_dist.training.loop import train as run

    return run(config)


def plan(config: Config) -> int:
    """Predicts memory per rank and step time, without weights and without GPUs."""
    from lisa_dist.commands.plan import run

    return run(config)


@explaining_memory
def bench(config: Config) -> int:
    """Measures tokens per second, the parts of a step and peak memory."""
    from lisa_dist.commands.bench.command import run

    return run(config)


def export(config: Config) -> int:
    """Writes a checkpoint as a Hugging Face directory."""
    from lisa_dist.commands.export import run

    return run(config)


@explaining_memory
def evaluate(config: Config) -> int:
    """Measures held-out loss and perplexity, or runs evaluation tasks."""
    from lisa_dist.commands.evaluate import run

    return run(config)


@explaining_memory
def generate(config: Config) -> int:
    """Answers prompts from a checkpoint or a Hugging Face directory."""
    from lisa_dist.commands.generate import run

    return run(config)


@explaining_memory
def chat(config: Config) -> int:
    """Talks in the terminal with a checkpoint or a Hugging Face directory."""
    from lisa_dist.commands.chat import run

    return run(config)


def report(config: Config) -> int:
    """Draws a run directory as one HTML page, or compares the jobs of a sweep."""
    from lisa_dist.commands.report import run

    return run(config)


def runs(config: Config) -> int:
    """Lists the runs below a folder: state, step, losses, speed and the last sign of life: runs FOLDER."""
    from lisa_dist.commands.runs import run

    return run(config)


def launch(config: Config, overrides: list[str], config_dir: str | None) -> int:
    """Writes, shows and submits the Slurm job script of a configuration: launch slurm."""
    from lisa_dist.launching.slurm import run

    return run(config, overrides, config_dir)


def init(config: Config, file: str, groups: tuple[str, ...]) -> int:
    """Writes a commented configuration file: init [FILE] [key=value ...]."""
    from lisa_dist.commands.init import run

    return run(config, file, groups)


def doctor(config: Config) -> int:
    """Checks torch, GPUs, NCCL, ports, disk and tokenizers, and says what to fix."""
    from lisa_dist.commands.doctor import run

    return run(config)


@dataclass(frozen=True)
class Command:
    """A command's function and the keys that its help lists."""

    function: Callable[..., int]  # of a Config, for launch and init of more; returns the exit code
    keys: tuple[str, ...]
    in_ranks: bool = False  # runs in every rank
    reads_run: bool = False  # takes its configuration from the run in run.dir
    only_reads: bool = False  # records of runs: logs nothing, and needs no torch

    @property
    def summary(self) -> str:
        """What the command does: its function's docstring."""
        return (self.function.__doc__ or "").rstrip(".")


SECONDS_FOR_RANK_0 = 20  # to find the same mistake; well below srun --wait=60, which ends a rank that waits longer
TRAINING = ("train", "plan", "bench", "launch")  # whose configuration is one to train with
TRAINING_KEYS = (
    "model data sampler update always_active optimizer scheduler train parallel precision checkpoint logger run"
)
COMMANDS = {
    "train": Command(train, tuple(TRAINING_KEYS.split()), in_ranks=True),
    "plan": Command(plan, ("plan", "model", "train", "parallel", "precision")),
    "bench": Command(bench, ("bench", "model", "train", "parallel", "precision"), in_ranks=True),
    "export": Command(export, ("export", "run"), reads_run=True),
    "evaluate": Command(evaluate, ("evaluate", "run", "parallel"), in_ranks=True, reads_run=True),
    "generate": Command(generate, ("generate", "run", "parallel"), in_ranks=True, reads_run=True),
    "chat": Command(chat, ("generate", "run", "parallel"), in_ranks=True, reads_run=True),
    "report": Command(report, ("run", "report", "sweep"), reads_run=True, only_reads=True),
    "runs": Command(runs, ("runs",), only_reads=True),
    "launch": Command(launch, ("launch", "run", "sweep")),
    "init": Command(init, tuple(TRAINING_KEYS.split())),
    "doctor": Command(doctor, ("parallel",)),
}
OPTIONS = {"--config-dir": 1, "--cfg": 1, "--compare": 2}  # the values that follow each


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            option = unknown[0].partition("=")[0]
            raise UserError(f"{option}: is no option, keys are written KEY=VALUE{key_here(option)}")
        raise UserError(f"{message}; see lisa-dist --help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake of the user, 75 stopped, 130 interrupted with
    nothing to save, 1 anything else.

    Any other exception than :class:`UserError` is a fault of the program and leaves with its full traceback.
    """
    expand_segments()
    if has_ranks():
        install_stop_handlers()  # as early as can be: a signal that comes while torch is imported counts too
    try:
        return _run(*_parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        # torchrun and srun end every rank as soon as one leaves, so rank 0 comes first: it says what all have found.
        if environment_rank() == 0 or not stops_within(SECONDS_FOR_RANK_0):
            print(f"lisa-dist: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OutOfMemoryError as error:  # of one rank or of several, each with its own place
        print(f"lisa-dist: rank {environment_rank()} failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("lisa-dist: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return what the options and words say, and of ``generate`` and ``chat`` the place and the prompt."""
    if arguments[:1] not in (["generate"], ["chat"]):
        return _parser().parse_intermixed_args(arguments), []
    groups = {field.name for field in fields(Config)} | set(GROUPS)
    read, literals = split_literals(arguments[1:], groups, OPTIONS)
    return _parser().parse_intermixed_args([*arguments[:1], *read]), literals


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lisa-dist", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--compare", nargs=2, metavar="RUN")
    return parser


def _run(arguments: argparse.Namespace, literals: list[str]) -> int:
    if arguments.version:
        print(f"lisa-dist {__version__}")
        return EXIT_DONE
    if not arguments.words:
        if not arguments.help:
            raise UserError(f"a command is missing, one of {', '.join(COMMANDS)}; see lisa-dist --help")
        print(help_text())
        return EXIT_DONE
    name, *overrides = arguments.words
    check_choice("command", name, COMMANDS)
    if arguments.help:
        print(command_help_text(name))
        return EXIT_DONE
    if arguments.compare and name != "generate":
        raise UserError(f"--compare: belongs to generate, not to {name}")
    if name == "launch":
        if overrides[:1] != ["slurm"]:
            raise UserError("launch: must be followed by slurm, as in lisa-dist launch slurm experiment=NAME")
        overrides = overrides[1:]
    if name == "init":
        file, overrides = split_words(overrides)
        return init(load(overrides, arguments.config_dir), file or "lisa.yaml", COMMANDS[name].keys)
    if name in TRAINING:
        file, overrides = split_words(overrides)
        if file is not None:  # what it says comes first, so that the command line counts
            overrides = [*file_overrides(file, overrides, arguments.config_dir), *overrides]
    if arguments.watch:
        if name != "report":
            raise UserError(f"--watch: the report of a run is watched, not {name}")
        overrides = [*overrides, "report.watch=true"]
    if name == "runs" and overrides and "=" not in overrides[0]:
        overrides[0] = write_override("runs.dir", overrides[0])
    if arguments.multirun:
        return _multirun(name, overrides, arguments.config_dir)
    if name in ("generate", "chat"):
        config = _answering(name, overrides, literals, arguments)
    else:
        config = _configuration(name, overrides, arguments.config_dir)
    if arguments.cfg == "job":
        if environment_rank() == 0:
            print(to_yaml(config), end="")
        return EXIT_DONE
    if name in TRAINING:
        check_combinations(config)
    if name == "launch":  # the script repeats the overrides, which a reader understands, not the whole configuration
        return launch(config, overrides, arguments.config_dir)
    if name == "generate" and config.generate.compare:
        return _compare(config.generate, overrides, arguments.config_dir)
    return _dispatch(name, config)


def _configuration(name: str, overrides: list[str], config_dir: str | None) -> Config:
    given = {
        override.key: override.value if isinstance(override.value, str) else override.text.partition("=")[2]
        for override in parse_overrides(overrides)
    }
    run_dir = given.get("run.dir", "null")
    if run_dir == "null":
        return load(overrides, config_dir)
    if COMMANDS[name].reads_run:
        return load_run(str(local_path(run_dir)), overrides)
    goes_on = name == "plan" or (name in ("train", "launch") and given.get("checkpoint.resume") == "auto")
    settings = RunDirectory(local_path(run_dir)).config
    if not goes_on or not settings.is_file():
        return load(overrides, config_dir)
    if environment_rank() == 0:
        print(f"lisa-dist: settings that are not given here are those of {settings}", file=sys.stderr)
    return resume_run(str(settings.parent), overrides, config_dir)


def _answering(name: str, overrides: list[str], literals: list[str], arguments: argparse.Namespace) -> Config:
    """Return the configuration of ``generate`` or ``chat``, with the place and the prompt that are given as text."""
    keys = {override.partition("=")[0] for override in overrides}
    named = arguments.compare or keys & {"run.dir", "generate.path", "generate.compare"}
    place, prompts = (None, literals) if named else (next(iter(literals), None), literals[1:])
    if len(prompts) > (name == "generate"):
        remedy = "put a prompt in quotes" if name == "generate" else "what you say is typed once the model is there"
        raise UserError(f"{name}: {prompts[-1]!r} is one text too many; {remedy}")
    if place is not None:
        config = _of_model(place, overrides, arguments.config_dir)
    elif arguments.compare:
        config = load(overrides, arguments.config_dir)
    else:
        config = _configuration(name, overrides, arguments.config_dir)
    choice = config.generate
    choice = replace(choice, prompts=prompts or choice.prompts, compare=arguments.compare or choice.compare)
    return replace(config, generate=choice)


def _of_model(place: str, overrides: list[str], config_dir: str | None) -> Config:
    """Return the configuration to ask the model at ``place``, the directory of a run or of Hugging Face."""
    directory = local_path(place)
    if RunDirectory(directory).config.is_file():
        return load_run(str(directory), overrides)
    config = load(overrides, config_dir)
    return replace(config, generate=replace(config.generate, path=place))


def _compare(choice: GenerateConfig, overrides: list[str], config_dir: str | None) -> int:
    """Ask each model, one after the other and each in ranks of its own, and show the answers side by side."""
    from lisa_dist.launching.inputs import check_generate

    check_output(choice.output)
    with tempfile.TemporaryDirectory(prefix="lisa-dist-compare-") as folder:
        files = [Path(folder) / f"{number}.jsonl" for number in range(len(choice.compare))]
        models = []
        for place, file in zip(choice.compare, files):
            model = _of_model(place, overrides, config_dir)
            asked = replace(model.generate, prompts=choice.prompts, compare=[], output=str(file))
            models.append(replace(model, generate=asked))
            check_generate(models[-1])
        for model in models:
            if (code := _dispatch("generate", model)) != EXIT_DONE:
                return code
        if environment_rank() == 0:
            from lisa_dist.commands.generate import show_side_by_side

            show_side_by_side(choice.compare, files, choice.output)
    return EXIT_DONE


def _dispatch(name: str, config: Config) -> int:
    """Run the command here, or start the ranks that run it where no launcher has."""
    command = COMMANDS[name]
    if command.only_reads:
        return command.function(config)
    if name == "train" and not has_ranks():
        config = resolve_run_dir(config)
    if name != "train" or not has_ranks():  # another rank may have begun the run that this one would refuse
        from lisa_dist.launching.inputs import CHECKS  # needs pyarrow, which --help should not wait for

        CHECKS.get(name, lambda config: None)(config)
    if not command.in_ranks:
        from lisa_dist.telemetry.logs import setup_logging

        setup_logging()
        return command.function(config)
    if has_ranks():
        if name != "train":
            end_at_signals()
        exit_code = command.function(config)
        ignore_stop_signals()
        return exit_code
    from lisa_dist.launching.rank_server import start_rank_server

    start_rank_server()
    from lisa_dist.launching.local import launch_ranks  # takes seconds, in which the server imports torch too

    if name == "train":
        return launch_ranks(config, command.function)
    logs = Path(tempfile.mkdtemp(prefix=f"lisa-dist-{name}-"))  # the run's own logs are its training's
    exit_code = EXIT_FAILED
    try:
        exit_code = launch_ranks(config, command.function, logs)
    except (UserError, KeyboardInterrupt):
        exit_code = EXIT_USER_ERROR
        raise
    finally:
        if exit_code != EXIT_FAILED:  # the message about a failure names them
            shutil.rmtree(logs, ignore_errors=True)
    return exit_code


def _multirun(name: str, overrides: list[str], config_dir: str | None) -> int:
    if name == "launch":
        from lisa_dist.launching.slurm import run_sweep as submit_sweep

        return submit_sweep(overrides, config_dir)
    if name != "train":
        raise UserError(f"--multirun: sweeps train only, not {name}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or has_ranks():
        raise UserError("--multirun: must be started once and not in every rank, so without torchrun or srun")
    from lisa_dist.launching.sweeps.run import run_sweep

    return run_sweep(overrides, config_dir)


def help_text() -> str:
    """Return what ``lisa-dist --help`` prints."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return f"""lisa-dist COMMAND [FILE.yaml] [key=value ...] [--cfg job] [--config-dir DIR] [--multirun]

Commands:
{commands}

  FILE.yaml         your own keys and values, for train, plan, bench and launch; lisa-dist init writes one
  --cfg job         prints the resolved configuration and does nothing else
  --config-dir DIR  a folder with your own groups: DIR/model/NAME.yaml, DIR/experiment/NAME.yaml, ...
  --watch           keeps a report up to date while its run goes on
  -m, --multirun    train once for every combination of values: optimizer.lr=1e-5,5e-5
  --compare A B     generate: the answers of two runs or Hugging Face directories side by side
  --version         prints the version

lisa-dist COMMAND --help lists the keys of a command."""


def command_help_text(name: str) -> str:
    """Return what ``lisa-dist COMMAND --help`` prints: the groups to choose from and the keys with their defaults."""
    command = COMMANDS[name]
    lines = [f"lisa-dist {name}{' slurm' if name == 'launch' else ''} [key=value ...]: {command.summary}", ""]
    if not command.reads_run:
        lines += ["Groups, one NAME each:"]
        lines += [f"  {group + '=NAME':<18}{', '.join(group_choices(group))}" for group in GROUPS]
        lines += [""]
    lines += ["Keys (default) and what they mean:"]
    for group in command.keys:
        for key in keys_of(group):
            start = f"  {key.name} ({key.default})"
            lines.append(f"{start:<46} {key.meaning}".rstrip())
    return "\n".join(lines)
