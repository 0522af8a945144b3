"""``lisa-dist generate``: answers to prompts, from a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import json
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lisa_dist.commands.inference import OpenedModel, answer_ends, open_model
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.config.prompts import Prompt, read_prompts
from lisa_dist.data.formats import BadRowError, read_messages
from lisa_dist.data.tokenizer import encode_prompt, render
from lisa_dist.launching.inputs import make_room
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import naming
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.training.generation import Answerer, AnswerSettings, draw_keys

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 4  # of a rank: prompts among which those of about the same length are answered together


def run(config: Config) -> int:
    """Answer ``generate.prompts`` and write the answers. Collective: every rank.

    Raises:
        UserError: there is no such model or no prompt, or ``generate.output`` is there already.
    """
    distributed.initialize(config.parallel)
    setup_logging()
    choice = config.generate
    prompts: list[Prompt] = distributed.on_rank_zero(lambda: read_prompts(choice.prompts))
    output = local_path(choice.output) if choice.output else None
    distributed.on_rank_zero(lambda: make_room(choice.output))
    read = [as_in_training(prompt) for prompt in prompts]
    opened = open_model(config, choice.path, choice.step, "generate")
    tokenizer = opened.tokenizer
    asked = [prompt_ids(tokenizer, prompt, choice.system) for prompt in read]
    answerer, settings = Answerer(opened.train_module), settings_of(config, opened)
    for number, ids in enumerate(asked, start=1):
        opened.check_tokens(ids, f"generate.prompts: prompt {number} of {len(asked)}")
    check_room(answerer, asked)
    at_once = BATCHES_AT_ONCE * choice.batch_size * answerer.dims.data_ranks
    keys = draw_keys(asked, settings.seed)  # of all: a prompt may come again in another part
    started, made = time.monotonic(), 0
    for start in range(0, len(asked), at_once):
        part = slice(start, start + at_once)
        found = answerer.answers(asked[part], settings, keys[part])
        made += sum(map(len, found))
        texts = [str(text).strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
        if distributed.is_main():
            for prompt, text in zip(prompts[start:], texts):
                _write(prompt, text, output)
            if len(prompts) > 1:
                done, seconds = start + len(found), time.monotonic() - started
                logger.info("%d of %d prompts answered, %.1f tokens/s", done, len(prompts), made / seconds)
    return EXIT_DONE


def settings_of(config: Config, opened: OpenedModel) -> AnswerSettings:
    """Return how ``generate.*`` and the opened model's files want prompts to be answered."""
    choice = config.generate
    ends = answer_ends(config, opened, choice.path)
    seed = config.train.seed
    return AnswerSettings(frozenset(ends), choice.max_new_tokens, choice.batch_size, choice.temperature, seed)


def as_in_training(prompt: Prompt) -> Prompt:
    """Return a prompt with its messages, where it has such, read as those of training data are.

    Raises:
        UserError: a message is none that could be trained, or the last one is an answer.
    """
    if isinstance(prompt, str):
        return prompt
    try:
        messages = read_messages(prompt)
    except BadRowError as error:
        raise UserError(f"generate.prompts: {error}, in {str(prompt)[:80]!r}") from error
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"generate.prompts: {str(prompt)[:80]!r} ends with an answer (role {prompt[-1]['role']}), so nothing is "
            "asked; leave that message out"
        )
    return messages


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, system: str | None = None) -> list[int]:
    """Return the tokens of a prompt: through the chat template where the tokenizer has one, else the text as it is.

    ``system`` is put before it, unless it is a conversation with a system prompt of its own.

    Raises:
        UserError: the template refuses the messages or leaves one out, or there is none for them.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            asked = encode_prompt(tokenizer, messages)
        except TemplateError as error:
            raise UserError(f"generate.prompts: the chat template refuses {str(prompt)[:80]!r} ({error})") from error
        _check_rendered(tokenizer, messages)
        return asked
    if isinstance(prompt, list) or system is not None:
        what = "messages need" if isinstance(prompt, list) else "generate.system needs"
        raise UserError(f"generate.prompts: {what} a chat template, and this model's tokenizer has none")
    ids: list[int] = tokenizer(prompt).input_ids
    # One that the tokenizer puts behind every text would end the prompt.
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not prompt.endswith(tokenizer.eos_token) else ids


def _check_rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> None:
    text = render(tokenizer, messages, prompt=True)
    for index, message in enumerate(messages if len(messages) > 1 else []):
        # It may be the system prompt that the template writes where there is none.
        with suppress(TemplateError):  # the template needs it
            without = render(tokenizer, messages[:index] + messages[index + 1 :], prompt=True)
            if without == text and str(message["content"]).strip() not in text:
                raise UserError(
                    f"generate.prompts: the chat template leaves out message {index + 1} of {len(messages)} "
                    f"({message['role']}) of {str(messages)[:80]!r}; leave it out, or say it in another one"
                )


def check_room(answerer: Answerer, prompts: list[list[int]]) -> None:
    """Raise :class:`UserError` where a prompt leaves the model no position for an answer."""
    for number, ids in enumerate(prompts, start=1):
        if answerer.room(ids, 1) == 0:
            raise UserError(
                f"generate.prompts: prompt {number} of {len(prompts)} has {len(ids)} tokens, and the model "
                f"{answerer.positions} positions; shorten it"
            )


def show_side_by_side(models: list[str], files: list[Path], output: str | None) -> None:
    """Print what several models answered, or write it as JSON lines with prompt and answers.

    Args:
        models: their names, as the user wrote them.
        files: of each the answers, as ``generate.output`` has them.
        output: ``generate.output`` of the comparison; None: print.
    """
    answers = [[json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] for file in files]
    rows = [(same[0]["prompt"], [row["answer"] for row in same]) for same in zip(*answers, strict=True)]
    if output is not None:
        lines = [json.dumps({"prompt": prompt, "answers": dict(zip(models, found))}) + "\n" for prompt, found in rows]
        with naming(local_path(output)):
            local_path(output).write_text("".join(lines), encoding="utf-8")
        return
    table = Table(show_lines=True)
    for title in ("prompt", *models):
        table.add_column(Text(title), overflow="fold", ratio=1)
    for prompt, found in rows:
        table.add_row(Text(prompt if isinstance(prompt, str) else json.dumps(prompt)), *map(Text, found))
    Console(highlight=False).print(table)


def _write(prompt: Prompt, text: str, output: Path | None) -> None:
    if output is None:
        print(text, flush=True)
        return
    with naming(output), output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
