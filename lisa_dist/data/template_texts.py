"""Comparing texts that a chat template wrote, with the special tokens that stand in them."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase


class TemplateTexts:
    """Knows a tokenizer's special tokens, and compares texts in whole tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = re.compile(_any_of(special))
        tokens = _any_of(special | {token.content for token in added})
        self._whole_words = re.compile(rf"{tokens}|<[^<>\s]{{1,40}}>")  # and tags that are no token, like <think>

    def agreement(self, one: str, other: str) -> int:
        """Return how far two texts agree, in whole tokens and tags: ``<|end|>`` and ``<|eot|>`` share nothing."""
        length = common_length(one, other)
        if length < len(one) or length < len(other):
            for text in (one, other):
                for match in self._whole_words.finditer(text, max(0, length - 100), length + 100):
                    if match.start() < length < match.end():
                        length = match.start()
                        break
        return length


def common_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared far faster than characters one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _any_of(texts: set[str]) -> str:
    return "|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or r"(?!)"
