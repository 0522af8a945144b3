"""The commands: one thin function each, what its help says, and the table of them.

Each imports what it runs when it is called: importing torch takes seconds, which neither a mistake in
the configuration nor ``--help`` should have to wait for. Importing leaves no garbage, and looking for it would take
a tenth of the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from lisa_dist.config import Config
from lisa_dist.config.loading import GROUPS, group_choices
from lisa_dist.config.reference import keys_of
from lisa_dist.runtime.garbage import no_garbage_collection

Function = Callable[[Config], int]


def explaining_memory(function: Function) -> Function:
    """Let a command that runs out of memory end in one sentence; ``train`` does it itself, it knows its step."""

    @functools.wraps(function)
    def run(config: Config) -> int:
        with no_garbage_collection():
            from lisa_dist.telemetry.out_of_memory import explaining_out_of_memory

        with explaining_out_of_memory(config, lambda: function.__name__, log=False):
            return function(config)

    return run


def train(config: Config) -> int:
    """Trains; where no model is chosen, a small demonstration."""
    with no_garbage_collection():
        from lisa_dist.training.loop import train as run

    return run(config)


def plan(config: Config) -> int:
    """Predicts memory per rank and step time, without weights and without GPUs."""
    from rich.console import Console

    with no_garbage_collection(), Console(stderr=True).status("loading"):  # on a terminal
        from lisa_dist.commands.plan import run

    return run(config)


@explaining_memory
def bench(config: Config) -> int:
    """Measures tokens per second, the parts of a step and peak memory."""
    with no_garbage_collection():
        from lisa_dist.commands.bench.command import run

    return run(config)


def export(config: Config) -> int:
    """Writes a checkpoint as a Hugging Face directory."""
    with no_garbage_collection():
        from lisa_dist.commands.export import run

    return run(config)


@explaining_memory
def evaluate(config: Config) -> int:
    """Measures held-out loss and perplexity, or runs evaluation tasks."""
    with no_garbage_collection():
        from lisa_dist.commands.evaluate import run

    return run(config)


@explaining_memory
def generate(config: Config) -> int:
    """Answers prompts from a checkpoint or a Hugging Face directory."""
    with no_garbage_collection():
        from lisa_dist.commands.generate import run

    return run(config)


@explaining_memory
def chat(config: Config) -> int:
    """Talks in the terminal with a checkpoint or a Hugging Face directory."""
    with no_garbage_collection():
        from lisa_dist.commands.chat import run

    return run(config)


def report(config: Config) -> int:
    """Draws a run directory as one HTML page, or compares the jobs of a sweep."""
    from lisa_dist.commands.report import run

    return run(config)


def runs(config: Config) -> int:
    """Lists the runs below a folder: state, step, losses, speed and the last sign of life."""
    from lisa_dist.commands.runs import run

    return run(config)


def launch(config: Config, overrides: list[str], config_dir: str | None) -> int:
    """Writes, shows and submits the Slurm job script of a configuration."""
    from lisa_dist.launching.slurm import run

    return run(config, overrides, config_dir)


def init(config: Config, file: str, groups: tuple[str, ...]) -> int:
    """Writes a commented configuration file."""
    from lisa_dist.commands.init import run

    return run(config, file, groups)


def doctor(config: Config) -> int:
    """Checks torch, GPUs, NCCL, ports, disk and tokenizers, and says what to fix."""
    with no_garbage_collection():
        from lisa_dist.commands.doctor import run

    return run(config)


@dataclass(frozen=True)
class Command:
    """A command's function, and the words and keys that its help lists."""

    function: Callable[..., int]  # of a Config, for launch and init of more; returns the exit code
    keys: tuple[str, ...]
    words: str = ""  # what may stand before key=value
    in_ranks: bool = False  # runs in every rank
    reads_run: bool = False  # takes its configuration from the run in run.dir
    only_reads: bool = False  # records of runs: logs nothing, and needs no torch

    @property
    def summary(self) -> str:
        """What the command does: its function's docstring."""
        return (self.function.__doc__ or "").rstrip(".")


TRAINING_KEYS = (
    "model data sampler update always_active optimizer scheduler train parallel precision checkpoint logger run"
)
COMMANDS = {
    "train": Command(train, tuple(TRAINING_KEYS.split()), "[FILE.yaml] ", in_ranks=True),
    "plan": Command(plan, ("plan", "model", "train", "parallel", "precision"), "[FILE.yaml] "),
    "bench": Command(bench, ("bench", "model", "train", "parallel", "precision"), "[FILE.yaml] ", in_ranks=True),
    "export": Command(export, ("export", "run"), reads_run=True),
    "evaluate": Command(evaluate, ("evaluate", "run", "parallel"), in_ranks=True, reads_run=True),
    "generate": Command(generate, ("generate", "run", "parallel"), '[PLACE "PROMPT"] ', in_ranks=True, reads_run=True),
    "chat": Command(chat, ("generate", "run", "parallel"), "[PLACE] ", in_ranks=True, reads_run=True),
    "report": Command(report, ("run", "report", "sweep"), reads_run=True, only_reads=True),
    "runs": Command(runs, ("runs",), "[FOLDER] ", only_reads=True),
    "launch": Command(launch, ("launch", "run", "sweep"), "slurm [FILE.yaml] "),
    "init": Command(init, tuple(TRAINING_KEYS.split()), "[FILE.yaml] "),
    "doctor": Command(doctor, ("parallel",)),
}


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
    """Return what ``lisa-dist COMMAND --help`` prints: its words, groups and keys with their defaults."""
    command = COMMANDS[name]
    lines = [f"lisa-dist {name} {command.words}[key=value ...]: {command.summary}", ""]
    if not (command.reads_run or command.only_reads):
        lines += ["Groups, one NAME each:"]
        lines += [f"  {group + '=NAME':<18}{', '.join(group_choices(group))}" for group in GROUPS]
        lines += [""]
    lines += ["Keys (default) and what they mean:"]
    for group in command.keys:
        for key in keys_of(group):
            start = f"  {key.name} ({key.default})"
            lines.append(f"{start:<46} {key.meaning}".rstrip())
    return "\n".join(lines)
