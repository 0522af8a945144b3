"""Chat templates in the manner of well-known models, and the demo tokenizer with the tokens that they need."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lisa_dist.data import load_tokenizer


@dataclass(frozen=True)
class Template:
    """A template, its special tokens, and what it writes right after an answer up to the end of the turn."""

    source: str
    tokens: tuple[str, ...]
    end: str


TEMPLATES = {
    "headers": Template(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "chatml": Template(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "model_turns": Template(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    "instructions": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        (),
        "</s>",
    ),
    # The last answer is opened by an empty thought, earlier answers are not: a prefix renders unlike the whole.
    "thoughts": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "no_generation_prompt": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
}


def tokenizer_with(template: Template | None) -> PreTrainedTokenizerBase:
    """Return the demo tokenizer with a template; None: with no template at all."""
    tokenizer = load_tokenizer("builtin:demo")
    tokenizer.chat_template = None if template is None else template.source
    if template is not None and template.tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(template.tokens)})
    return tokenizer


def trained_runs(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int]) -> list[str]:
    """Return the text of every unbroken run of trained tokens."""
    runs: list[list[int]] = []
    for index, label in enumerate(labels):
        if label == -100:
            continue
        assert label == input_ids[index]
        if index == 0 or labels[index - 1] == -100:
            runs.append([])
        runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]
