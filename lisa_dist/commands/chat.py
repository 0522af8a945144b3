"""``lisa-dist chat``: a conversation in the terminal with a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from lisa_dist.commands.generate import prompt_ids, settings_of
from lisa_dist.commands.inference import open_model
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.data.tokenizer import ensure_chat_template
from lisa_dist.runtime import distributed
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.training.generation import Answerer

ASK = "> "
CHANNEL = "<|channel|>"  # of gpt-oss, which thinks in other channels
FINAL = f"{CHANNEL}final<|message|>"
HELP = "Type what you want to say. /new begins another conversation, /end or Ctrl-D ends the chat."


def run(config: Config) -> int:
    """Talk until the user ends it: rank 0 reads stdin, every rank answers. Collective: every rank.

    Raises:
        UserError: there is no such model, or the chat template refuses the system prompt.
    """
    distributed.initialize(config.parallel)
    setup_logging()
    opened = open_model(config, config.generate.path, config.generate.step, "generate")
    tokenizer = opened.tokenizer
    ensure_chat_template(tokenizer)
    answerer, settings = Answerer(opened.train_module), settings_of(config, opened)
    system = config.generate.system
    prompt_ids(tokenizer, "Hello", system)  # refused at once, not after something was typed
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if distributed.is_main() else None
    _say(HELP)
    messages: list[dict[str, Any]] = []
    turn = 0
    while (said := distributed.on_rank_zero(_read)) is not None:
        if said == "/new":
            messages = []
            _say("A new conversation.")
            continue
        asked = [*messages, {"role": "user", "content": said}]
        try:
            ids = prompt_ids(tokenizer, asked, system)
            opened.check_tokens(ids, "chat: what is said")
        except UserError as error:
            _say(str(error))
            continue
        if answerer.room(ids, 1) == 0:
            _say(f"The conversation has {len(ids)} tokens, and the model {answerer.positions} positions; type /new.")
            continue
        # Another seed for each turn, so that what is asked again is drawn anew.
        found = answerer.stream(ids, replace(settings, seed=settings.seed + turn), streamer)
        if len(found) == answerer.room(ids, settings.max_new_tokens):
            _say(f"(cut after {len(found)} tokens; generate.max_new_tokens sets how many)")
        turn += 1
        messages = [*asked, {"role": "assistant", "content": spoken(found, tokenizer)}]
    return EXIT_DONE


def spoken(answer: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what of an answer goes into the history: of gpt-oss what is in its last channel ``final``.

    Its template writes content into that channel, and no thoughts of earlier turns
    (https://cookbook.openai.com/articles/openai-harmony).
    """
    text = str(tokenizer.decode(answer, skip_special_tokens=False))
    if CHANNEL in tokenizer.get_added_vocab() and CHANNEL in text:
        final = text.rpartition(FINAL)[2] if FINAL in text else ""
        answer = tokenizer(final, add_special_tokens=False).input_ids
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def _read() -> str | None:
    """Return what the user says next, None at the end."""
    while True:
        try:
            said = input(ASK if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"chat: what is typed must be UTF-8 ({error})") from error
        if said:
            return None if said == "/end" else said


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)
