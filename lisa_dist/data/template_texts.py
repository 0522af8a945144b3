"""What a chat template is made of: comparing texts that it wrote, by special tokens, and how it opens an answer."""

from __future__ import annotations

import re
from functools import lru_cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

TRAINING_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # of transformers alone; they write nothing
OPENS = "add_generation_prompt"
LOOP = nodes.Name("loop", "load")


class TemplateTexts:
    """Knows a tokenizer's special tokens, and compares texts in whole tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = re.compile(_any_of(special))
        tokens = _any_of(special | {token.content for token in added})
        self.whole_words = re.compile(rf"{tokens}|<[^<>\s]{{1,40}}>")  # and tags that are no token, like <think>

    def agreement(self, one: str, other: str) -> int:
        """Return how far two texts agree, in whole tokens and tags: ``<|end|>`` and ``<|eot|>`` share nothing."""
        length = common_length(one, other)
        if length < len(one) or length < len(other):
            for text in (one, other):
                for match in self.whole_words.finditer(text, max(0, length - 100), length + 100):
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


@lru_cache(maxsize=16)
def opens_by_a_constant(template: str) -> bool:
    """Whether what a chat template writes to open an answer is the same in every prompt.

    So it is where ``add_generation_prompt`` is asked for by nothing but plain conditions, and no variable of the
    template, no message and no tool has a part in what these let through.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(TRAINING_TAGS.sub("", template))
    except TemplateSyntaxError:
        return False
    conditions = [node for node in tree.find_all(nodes.If) if _asks_to_open(node.test)]
    names = list(tree.find_all(nodes.Name))
    changing = {name.name for name in names if name.ctx != "load"} | {
        macro.name for macro in tree.find_all(nodes.Macro)
    }
    changing |= {"messages", "tools", "loop", "caller", "varargs", "kwargs"}
    opening = {name.name for condition in conditions for part in condition.body for name in part.find_all(nodes.Name)}
    return sum(name.name == OPENS for name in names) == len(conditions) and not opening & changing


def _asks_to_open(test: nodes.Node) -> bool:
    """Whether a condition is ``add_generation_prompt``, or that and ``loop.last``."""
    parts = [test.left, test.right] if isinstance(test, nodes.And) else [test]
    asks = [isinstance(part, nodes.Name) and part.name == OPENS for part in parts]
    last = [isinstance(part, nodes.Getattr) and part.attr == "last" and part.node == LOOP for part in parts]
    return sum(asks) == 1 and all(one or other for one, other in zip(asks, last))
