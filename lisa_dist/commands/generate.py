"""``lisa-dist generate``: answers to prompts, from a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from lisa_dist.commands.inference import open_model
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.paths import local_path, model_directory
from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.spans import AnswerFinder
from lisa_dist.data.tokenizer import encode_prompt
from lisa_dist.runtime import distributed
from lisa_dist.runtime.files import make_folder
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.training.evaluation import answer

TURN = "turn"  # stands for what is said, to see what the chat template ends an answer with

Prompt = str | list[dict[str, Any]]  # a question, a text to go on with, or chat messages


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
    distributed.on_rank_zero(lambda: _check_output(output))
    opened = open_model(config, choice.path, choice.step, "generate")
    generator = torch.Generator().manual_seed(config.train.seed)
    stops = stop_ids(opened.tokenizer, model_directory(str(choice.path or config.model.path)))
    for prompt in prompts:
        ids = prompt_ids(opened.tokenizer, prompt)
        found = answer(
            opened.train_module.store.module, ids, stops, choice.max_new_tokens, choice.temperature, generator
        )
        text = str(opened.tokenizer.decode(found, skip_special_tokens=True)).strip()
        if distributed.is_main():
            _write(prompt, text, output)
    return EXIT_DONE


def read_prompts(prompts: Any) -> list[Prompt]:
    """Return the prompts of ``generate.prompts``: a list, or the lines of a file, JSON lines where it ends in .jsonl.

    Raises:
        UserError: there are none, or the file can't be read.
    """
    if isinstance(prompts, list):
        found: list[Prompt] = [str(prompt) for prompt in prompts]
    else:
        file = local_path(str(prompts))
        if not file.is_file():
            raise UserError(f"generate.prompts={prompts}: must be a list such as ['Hello'] or a file that exists")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"generate.prompts={prompts}: can't be read ({error})") from error
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        as_json = file.suffix in (".jsonl", ".ndjson")
        found = [_prompt_of(file, number, line) if as_json else line for number, line in numbered]
    if not found:
        raise UserError(f"generate.prompts={prompts}: holds no prompt; give a list or a file with one prompt a line")
    return found


def _prompt_of(file: Path, number: int, line: str) -> Prompt:
    """Return the prompt of a line of JSON: its ``prompt``, a text, or its ``messages``, as in chat data."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"generate.prompts={file}: line {number} is not valid JSON ({error})") from error
    prompt = (row.get("prompt") or row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(prompt, str | list):
        raise UserError(f'generate.prompts={file}: line {number} must be an object with "prompt" or "messages"')
    return prompt


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the tokens of a prompt: through the chat template where the tokenizer has one, else the text as it is."""
    if tokenizer.chat_template:
        try:
            return encode_prompt(tokenizer, prompt)
        except TemplateError as error:
            raise UserError(f"generate.prompts: the chat template refuses {str(prompt)[:80]!r} ({error})") from error
    if isinstance(prompt, list):
        raise UserError("generate.prompts: messages need a chat template, and this model's tokenizer has none")
    return tokenizer(prompt).input_ids


def stop_ids(tokenizer: PreTrainedTokenizerBase, directory: Path | None) -> set[int]:
    """Return the tokens that end an answer: those of the generation config, and what ends a text and a turn.

    ``directory`` is the model's, where generation_config.json may be; None for a hub id.
    """
    found = {int(tokenizer.eos_token_id)}
    if directory is not None and (directory / GENERATION_CONFIG_NAME).is_file():
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
        found |= set(ends) if isinstance(ends, list) else {ends} - {None}
    if tokenizer.chat_template:
        turns = [{"role": role, "content": TURN} for role in ("user", "assistant", "user", "assistant")]
        try:
            answers = AnswerFinder(tokenizer).find(Conversation(turns))
        except BadRowError:
            return found
        # Where nothing ends the last answer, a middle one may end by the next header, which a model learns to write.
        begin, end = answers.spans[3 if answers.ended else 1]
        last = tokenizer(answers.text[begin:end], add_special_tokens=False).input_ids[-1]
        if last in tokenizer.all_special_ids:
            found.add(last)
    return found


def _check_output(output: Path | None) -> None:
    if output is not None and output.exists():
        raise UserError(f"generate.output={output}: is there already and is not written over, name a new file")
    if output is not None:
        make_folder(output.parent, f"generate.output={output}")


def _write(prompt: Prompt, text: str, output: Path | None) -> None:
    if output is None:
        print(text, flush=True)
        return
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
