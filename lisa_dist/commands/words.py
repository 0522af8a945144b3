"""Which configuration the words of a command line mean: keys, a run, or a model that is to be asked."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from lisa_dist.commands.table import COMMANDS, TRAINING_KEYS
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import GROUPS, load, load_run, resume_run
from lisa_dist.config.overrides import parse_overrides
from lisa_dist.config.paths import local_path, path_exists
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.launching.rank_server import may_have_gpu
from lisa_dist.runtime.environment import environment_rank

NOT_OF_CHAT = ("generate.prompts", "generate.output", "generate.compare", "generate.batch_size")


def configuration_of(name: str, overrides: list[str], config_dir: str | None) -> Config:
    """Return the configuration of a command: a run's own where it reads or goes on with one, else what is given."""
    given = {
        override.key: override.value if isinstance(override.value, str) else override.text.partition("=")[2]
        for override in parse_overrides(overrides)
    }
    run_dir = given.get("run.dir", "null")
    if run_dir == "null":
        return (load_to_ask if COMMANDS[name].reads_run else load)(overrides, config_dir)
    if COMMANDS[name].reads_run:
        return load_run(str(local_path(run_dir)), overrides)
    goes_on = name == "plan" or (name in ("train", "launch") and given.get("checkpoint.resume") == "auto")
    settings = RunDirectory(local_path(run_dir)).config
    if not goes_on or not settings.is_file():
        if name == "plan" and {key.partition(".")[0] for key in given} <= {"run", "plan"}:  # of no other model
            raise UserError(
                f"run.dir={run_dir}: must be the directory of a run, which has a {settings.name}, or a model must be "
                "named beside it"
            )
        return load(overrides, config_dir)
    if name != "plan" and RunDirectory(settings.parent).foreign() is not None:  # refused by name before it starts
        return load(overrides, config_dir)
    if environment_rank() == 0:
        print(f"lisa-dist: settings that are not given here are those of {settings}", file=sys.stderr)
    return resume_run(str(settings.parent), overrides, config_dir)


def keys_of_other_commands(name: str, overrides: list[str]) -> list[str]:
    """Return a sentence for each override of a key that the command does not read, and others do."""
    sentences = []
    for override in parse_overrides(overrides):
        group = override.key.partition(".")[0]
        readers = [other for other, command in COMMANDS.items() if group in command.keys]
        if override.key in NOT_OF_CHAT:
            readers.remove("chat")
        if override.key == "parallel.nodes":
            readers = ["plan", "launch", "init"]
        elif group in {*TRAINING_KEYS.split(), *GROUPS}:
            continue
        if group == "sweep":
            readers.append("train --multirun")
        if name not in readers:
            sentences.append(f"{override.text}: has no effect on {name}, it is a key of {', '.join(readers)}")
    return sentences


def answering_configuration(
    name: str, overrides: list[str], literals: list[str], compare: list[str] | None, config_dir: str | None
) -> Config:
    """Return the configuration of ``generate`` or ``chat``.

    Args:
        name: of the command.
        overrides: KEY=VALUE.
        literals: the place and the prompt, as text.
        compare: the two places of ``--compare``.
        config_dir: that of ``--config-dir``.

    Raises:
        UserError: there is more text than the command takes, or prompts are given twice, or a key is wrong.
    """
    keys = {override.partition("=")[0] for override in overrides}
    named = compare or keys & {"run.dir", "generate.path", "generate.compare"}
    place, prompts = (None, literals) if named else (next(iter(literals), None), literals[1:])
    if len(prompts) > (name == "generate"):
        remedy = "put a prompt in quotes" if name == "generate" else "what you say is typed once the model is there"
        raise UserError(f"{name}: {prompts[-1]!r} is one text too many; {remedy}")
    if place is not None:
        config = configuration_to_ask(place, overrides, config_dir)
    elif compare:
        config = load_to_ask(overrides, config_dir)
    else:
        config = configuration_of(name, overrides, config_dir)
    choice = config.generate
    if name == "generate" and place is not None and not (prompts or choice.prompts):
        raise UserError(f'generate: {place} is taken for the model, and there is no prompt: generate PLACE "PROMPT"')
    if prompts and "generate.prompts" in keys:
        raise UserError(f"generate.prompts: stands beside the prompt {prompts[0]!r}; leave one of the two out")
    for prompt in prompts if environment_rank() == 0 else ():
        if path_exists(file := local_path(prompt)) and file.is_file():
            said = f"{prompt!r} is asked as it stands; generate.prompts={prompt} asks what the file holds"
            print(f"lisa-dist: {said}", file=sys.stderr)
    choice = replace(choice, prompts=prompts or choice.prompts, compare=compare or choice.compare)
    return replace(config, generate=choice)


def configuration_to_ask(place: str, overrides: list[str], config_dir: str | None) -> Config:
    """Return the configuration to ask the model at ``place``, the directory of a run or of Hugging Face."""
    directory = local_path(place)
    if RunDirectory(directory).config.is_file():
        return load_run(str(directory), overrides)
    config = load_to_ask(overrides, config_dir)
    return replace(config, generate=replace(config.generate, path=place))


def load_to_ask(overrides: list[str], config_dir: str | None) -> Config:
    """Return the configuration to ask a model of no run: nothing of the demonstration's; without a GPU in float32.

    A CPU without units for bf16 takes five times as long with it. What the overrides say counts.
    """
    if any(override.key == "experiment" for override in parse_overrides(overrides)):
        return load(overrides, config_dir)
    on_gpu = may_have_gpu() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    usual = ["model=custom"] if on_gpu else ["model=custom", "precision.compute=float32"]
    return load([*usual, *overrides], config_dir)
