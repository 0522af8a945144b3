"""The command line: ``lisa-dist COMMAND [key=value ...]``, one thin function a command.

Command modules are imported when their command runs: importing torch takes seconds, which neither a mistake
in the configuration nor ``--help`` should have to wait for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from lisa_dist import __version__
from lisa_dist.config import EXIT_DONE, EXIT_USER_ERROR, Config, UserError
from lisa_dist.config.errors import check_choice
from lisa_dist.config.loading import load, load_run, to_yaml
from lisa_dist.config.run_directory import check_run_dir_is_free, resolve_run_dir
from lisa_dist.environment import environment_rank, has_ranks
from lisa_dist.rank_log import set_up_logging
from lisa_dist.signals import install_stop_handlers

COMMANDS = {
    "train": "trains; without a model or data, a complete demonstration",
    "plan": "predicts memory per rank and step time, without weights and without GPUs",
    "bench": "measures tokens per second, the parts of a step and peak memory",
    "export": "writes a checkpoint as a Hugging Face directory",
    "evaluate": "measures held-out loss and perplexity, or runs evaluation tasks",
    "generate": "answers prompts from a checkpoint or a Hugging Face directory",
    "report": "draws a run directory as one HTML page",
    "launch": "launch slurm: writes, shows and submits the Slurm job script of a config",
    "doctor": "checks torch, GPUs, NCCL, ports, disk and tokenizers",
}
RANK_ENTRIES = {"train": "lisa_dist.trainer:train", "bench": "lisa_dist.commands.bench:run"}  # these run in ranks
RUN_READERS = {"export", "evaluate", "generate", "report"}  # these take their configuration from run.dir


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see lisa-dist --help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a mistake of the user, 75 stopped, 1 anything else.

    Any other exception than :class:`UserError` is a fault of the program and leaves with its full traceback.
    """
    try:
        return _run(_parser().parse_intermixed_args(arguments))
    except UserError as error:
        if environment_rank() == 0:
            print(f"lisa-dist: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lisa-dist", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", choices=["job"])
    parser.add_argument("--config-dir")
    parser.add_argument("-m", "--multirun", action="store_true")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.version:
        print(f"lisa-dist {__version__}")
        return EXIT_DONE
    if not arguments.words:
        raise UserError("a command is missing, one of " + ", ".join(COMMANDS))
    command, *overrides = arguments.words
    check_choice("lisa-dist COMMAND", command, COMMANDS)
    if command == "launch":
        if overrides[:1] != ["slurm"]:
            raise UserError("launch: must be followed by slurm, as in lisa-dist launch slurm model=NAME")
        overrides = overrides[1:]
    if arguments.multirun:
        return _multirun(command, overrides, arguments.config_dir)
    config = _configuration(command, overrides, arguments.config_dir)
    if arguments.cfg == "job":
        print(to_yaml(config), end="")
        return EXIT_DONE
    if command in RANK_ENTRIES:
        return _in_ranks(command, config)
    module = "lisa_dist.launching.slurm" if command == "launch" else f"lisa_dist.commands.{command}"
    return _import_function(f"{module}:run")(config)


def _multirun(command: str, overrides: list[str], config_dir: str | None) -> int:
    if command != "train":
        raise UserError(f"--multirun: sweeps train only, not {command}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--multirun: must be started once and not in every rank, so without torchrun")
    return importlib.import_module("lisa_dist.launching.sweep").run_sweep(overrides, config_dir)


def _configuration(command: str, overrides: list[str], config_dir: str | None) -> Config:
    run_dirs = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    if command in RUN_READERS and run_dirs:
        return load_run(run_dirs[-1], overrides)
    return load(overrides, config_dir)


def _in_ranks(command: str, config: Config) -> int:
    """Run the command in this process where a launcher started it as a rank, else start the ranks."""
    if has_ranks():
        install_stop_handlers()
        set_up_logging(verbose=environment_rank() == 0)
        return _import_function(RANK_ENTRIES[command])(config)
    config = resolve_run_dir(config)
    if command == "train":
        check_run_dir_is_free(config)
    launch_ranks = importlib.import_module("lisa_dist.launching.local").launch_ranks
    return launch_ranks(config, RANK_ENTRIES[command])


def _import_function(address: str) -> Callable[[Config], int]:
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
