"""The command line: ``lisa-dist COMMAND [key=value ...]``, from its words to a command's function and its ranks."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from lisa_dist import __version__
from lisa_dist.commands.table import COMMANDS, command_help_text, help_text
from lisa_dist.commands.words import (
    answering_configuration,
    configuration_of,
    configuration_to_ask,
    keys_of_other_commands,
)
from lisa_dist.config import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Config,
    GenerateConfig,
    ResourceError,
    UserError,
)
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.config_file import file_overrides, split_words
from lisa_dist.config.errors import check_choice
from lisa_dist.config.loading import GROUPS, load, to_yaml
from lisa_dist.config.other_trainers import key_here
from lisa_dist.config.overrides import write_override
from lisa_dist.config.paths import local_path, path_exists, refusal
from lisa_dist.config.prompts import read_prompts, split_literals
from lisa_dist.config.run_directory import resolve_run_dir
from lisa_dist.runtime.environment import environment_rank, expand_segments, has_ranks, of_mpi
from lisa_dist.runtime.garbage import no_garbage_collection
from lisa_dist.runtime.signals import end_at_signals, ignore_stop_signals, install_stop_handlers, stops_within

SECONDS_FOR_RANK_0 = 20  # to find the same mistake; well below srun --wait=60, which ends a rank that waits longer
TRAINING = ("train", "plan", "bench", "launch")  # whose configuration is one to train with
OPTIONS = {"--config-dir": 1, "--cfg": 1, "--compare": 2}  # the values that follow each


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            option = unknown[0].partition("=")[0]
            is_file = option in ("-c", "--config", "--config-file", "--config_file")
            file = ", and a configuration file is a word of its own: lisa-dist train FILE.yaml" if is_file else ""
            raise UserError(f"{option}: is no option, keys are written KEY=VALUE{file or key_here(option)}")
        raise UserError(f"{message}; see lisa-dist --help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake of the user, 75 stopped, 130 interrupted with
    nothing to save, 1 anything else.

    Any other exception than :class:`UserError`, and the system's refusal of a path, is a fault of the program and
    leaves with its full traceback.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if sys.stdin is None:  # closed, so that what is opened next would be taken for it
        os.open(os.devnull, os.O_RDONLY)
    expand_segments()
    if has_ranks():
        install_stop_handlers()  # as early as can be: a signal that comes while torch is imported counts too
    try:
        code = _run(*_parse(words))
        print(end="", flush=True)  # what nobody reads any more is told here, and not when Python ends
        return code
    except (UserError, OSError) as error:
        mistake = str(error) if isinstance(error, UserError) else refusal(error, words)
        if mistake is None:
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is not written yet
        # torchrun and srun end every rank as soon as one leaves, so rank 0 comes first: it says what all have found.
        if environment_rank() == 0 or not stops_within(SECONDS_FOR_RANK_0):
            print(f"lisa-dist: {mistake}", file=sys.stderr)
        return EXIT_USER_ERROR
    except ResourceError as error:  # of one rank or of several, each with its own place
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
    if arguments.words[:1] == ["help"]:
        arguments.help, arguments.words = True, arguments.words[1:]
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
    _check_options(name, arguments)
    if name == "launch":
        if overrides[:1] != ["slurm"]:
            raise UserError("launch: must be followed by slurm, as in lisa-dist launch slurm experiment=NAME")
        overrides = overrides[1:]
    if name == "init":
        file, overrides = split_words(overrides)
        config = load(overrides, arguments.config_dir)
        _tell(keys_of_other_commands(name, overrides))
        return COMMANDS[name].function(config, file or "lisa.yaml", COMMANDS[name].keys)
    given = overrides
    if name in TRAINING:
        file, given = split_words(overrides)
        said = [] if file is None else file_overrides(file, given, arguments.config_dir)
        overrides = [*said, *given]  # what the file says comes first, so that the command line counts
    if arguments.watch:
        overrides = [*overrides, "report.watch=true"]
    if name == "runs":
        given = overrides = _with_folder(overrides)
    if arguments.multirun:
        return _multirun(name, overrides, arguments.config_dir)
    if name in ("generate", "chat"):
        config = answering_configuration(name, overrides, literals, arguments.compare, arguments.config_dir)
    else:
        config = configuration_of(name, overrides, arguments.config_dir)
    if arguments.cfg == "job":
        if environment_rank() == 0:
            print(to_yaml(config), end="")
        return EXIT_DONE
    if name in TRAINING:
        check_combinations(config)
    _tell(keys_of_other_commands(name, given))
    if name == "launch":  # the script repeats the overrides, which a reader understands, not the whole configuration
        return COMMANDS[name].function(config, overrides, arguments.config_dir)
    if name == "generate" and config.generate.compare:
        return _compare(config.generate, overrides, arguments.config_dir)
    return _dispatch(name, config)


def _with_folder(words: list[str]) -> list[str]:
    """Return the words of ``runs``, of which one may be the folder, as overrides."""
    folders = [word for word in words if "=" not in word or (path_exists(path := local_path(word)) and path.is_dir())]
    if len(folders) > 1:
        raise UserError(f"{folders[1]}: the runs of one folder are listed, and {folders[0]} is given already")
    return [write_override("runs.dir", word) if word in folders else word for word in words]


def _tell(sentences: list[str]) -> None:
    """Print sentences to stderr, on rank 0."""
    for sentence in sentences if environment_rank() == 0 else ():
        print(f"lisa-dist: {sentence}", file=sys.stderr)


def _check_options(name: str, arguments: argparse.Namespace) -> None:
    """Raise :class:`UserError` for an option that the command, or another option, does not go with."""
    if arguments.compare and name != "generate":
        raise UserError(f"--compare: belongs to generate, not to {name}")
    if arguments.watch and name != "report":
        raise UserError(f"--watch: the report of a run is watched, not {name}")
    if arguments.multirun and name not in ("train", "launch"):
        raise UserError(f"--multirun: sweeps train only, not {name}")
    if arguments.cfg and (arguments.multirun or name == "init"):
        many = "--multirun has one for each job" if arguments.multirun else "init writes it to a file"
        raise UserError(f"--cfg {arguments.cfg}: prints one configuration, and {many}; leave one of the two out")


def _compare(choice: GenerateConfig, overrides: list[str], config_dir: str | None) -> int:
    """Ask each model, one after the other and each in ranks of its own, and show the answers side by side."""
    from lisa_dist.launching.inputs import check_opened, make_room

    read_prompts(choice.prompts)
    with tempfile.TemporaryDirectory(prefix="lisa-dist-compare-") as folder:
        files = [Path(folder) / f"{number}.jsonl" for number in range(len(choice.compare))]
        models = []
        for place, file in zip(choice.compare, files):
            model = configuration_to_ask(place, overrides, config_dir)
            asked = replace(model.generate, prompts=choice.prompts, compare=[], output=str(file))
            models.append(replace(model, generate=asked))
            check_opened(models[-1], models[-1].generate.path, "generate.compare")
        make_room(choice.output)
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
        with no_garbage_collection():
            from lisa_dist.telemetry.logs import setup_logging

        setup_logging()
        return command.function(config)
    if has_ranks():
        if name != "train":
            end_at_signals()
        exit_code = command.function(config)
        ignore_stop_signals()
        return exit_code
    if told := of_mpi():
        _tell([f"{told}: processes of mpirun are no ranks here, each runs this alone; start ranks by torchrun or srun"])
    from lisa_dist.launching.rank_server import start_rank_server

    start_rank_server()
    with no_garbage_collection():
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
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1") or has_ranks():
        raise UserError("--multirun: must be started once and not in every rank, so without torchrun or srun")
    from lisa_dist.launching.sweeps.jobs import read_sweep

    space, config = read_sweep(overrides, config_dir)
    from lisa_dist.launching.sweeps.run import run_sweep  # needs torch, which a mistake should not wait for

    return run_sweep(space, config, config_dir)
