"""The tokens that end an answer."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.spans import AnswerFinder

TURN = "turn"  # stands for what is said, to see what the chat template ends an answer with


def stop_ids(tokenizer: PreTrainedTokenizerBase, directory: Path | None = None) -> set[int]:
    """Return the tokens that end an answer: those of the generation config, and what ends a text and a turn.

    ``directory`` is the model's, where generation_config.json may be.
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
