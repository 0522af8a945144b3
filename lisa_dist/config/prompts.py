"""Prompts as a user gives them: literal text on the command line, a list, or a file. Read without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lisa_dist.config.errors import UserError, as_written
from lisa_dist.config.paths import local_path, path_exists

Prompt = str | list[dict[str, Any]]  # a question, a text to go on with, or chat messages

BESIDE = ("system", "tools", "functions")  # columns of chat data that change what a model is asked

_OVERRIDE = re.compile(r"[+~]{0,2}(\w+)(\.\w+)*=")
_OPTION = re.compile(r"--?[a-zA-Z][\w-]*(=\S*)?")


def split_literals(
    arguments: list[str], groups: Collection[str], options: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Return the arguments that are options or overrides, and the others, which are meant letter by letter.

    All that follows ``--`` is of the others.

    Args:
        arguments: of a command that takes a place or a prompt.
        groups: what the keys of overrides begin with.
        options: how many values follow each option.
    """
    read: list[str] = []
    literals: list[str] = []
    rest = iter(arguments)
    for word in rest:
        override = _OVERRIDE.match(word)
        if word == "--":
            literals += rest
        elif _OPTION.fullmatch(word):
            read += [word, *islice(rest, options.get(word, 0))]
        elif override and override[1] in groups:
            read.append(word)
        else:
            literals.append(word)
    return read, literals


def read_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts of ``generate.prompts``: a list, or the lines of a file, JSON lines where its name says so.

    Raises:
        UserError: there are none, one is empty, or the file can't be read.
    """
    if isinstance(prompts, list):
        for prompt in prompts:
            if isinstance(prompt, bool | float):
                raise UserError(f"generate.prompts: {as_written(prompt)} is read as no text; put it in quotes")
            if prompt is None or isinstance(prompt, dict | list):
                raise UserError(
                    f"generate.prompts: {prompt!r} is no text; conversations go into a file of JSON lines with messages"
                )
        found: list[Prompt] = [str(prompt) for prompt in prompts]
    else:
        file = local_path(str(prompts))
        if not file.is_file():
            raise UserError(f"generate.prompts={prompts}: must be a list such as ['Hello'] or a file that exists")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # editors on Windows begin files with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"generate.prompts={prompts}: can't be read ({error})") from error
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        as_json = file.suffix.lower() in (".json", ".jsonl", ".ndjson")
        found = [_prompt_of(file, number, line) if as_json else line for number, line in numbered]
    if not found:
        raise UserError(f"generate.prompts={prompts}: holds no prompt; give a list or a file with one prompt a line")
    empty = next((number for number, prompt in enumerate(found, start=1) if not _has_text(prompt)), None)
    if empty is not None:
        raise UserError(f"generate.prompts={prompts}: prompt {empty} of {len(found)} is empty; write what is asked")
    return found


def check_output(output: str | None) -> None:
    """Raise :class:`UserError` where ``generate.output`` is there already."""
    if output is not None and path_exists(local_path(output)):
        raise UserError(f"generate.output={output}: is there already and is not written over, name a new file")


def _prompt_of(file: Path, number: int, line: str) -> Prompt:
    """Return the prompt of a line of JSON: its ``prompt``, a text, or its ``messages``, as in chat data."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"generate.prompts={file}: line {number} is not valid JSON ({error})") from error
    row = row if isinstance(row, dict) else {}
    prompt = row.get("messages") if row.get("prompt") is None else row["prompt"]
    dropped = next((name for name in BESIDE if row.get(name)), None)
    if dropped is not None:
        raise UserError(
            f"generate.prompts={file}: line {number} has {dropped}, which would not be asked with; "
            "a system prompt goes into messages or generate.system, and tools are not known here"
        )
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        if prompt and prompt[-1].get("role") == "assistant":
            raise UserError(
                f"generate.prompts={file}: line {number} ends with an answer (role assistant), so nothing is asked; "
                "leave that message out"
            )
        return prompt
    raise UserError(f'generate.prompts={file}: line {number} must be an object with "prompt" or "messages"')


def _has_text(prompt: Prompt) -> bool:
    return bool(prompt.strip()) if isinstance(prompt, str) else bool(prompt)
