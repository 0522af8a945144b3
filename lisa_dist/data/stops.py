"""The tokens that end an answer."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lisa_dist.data.formats import BadRowError, Conversation
from lisa_dist.data.spans import AnswerFinder

TURN = "turn"  # stands for what is said, to see what the chat template ends an answer with


def stop_ids(tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None = None) -> set[int]:
    """Return the tokens that end an answer: what ends a text and a turn, and ``own``, those that the model names."""
    found = {int(tokenizer.eos_token_id), *ids_of(own)}
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


def ids_of(eos_token_id: int | list[int] | None) -> list[int]:
    """Return the tokens that an ``eos_token_id`` of a model's files names: none, one or several."""
    if eos_token_id is None:
        return []
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
