"""Chat templates in the manner of well-known models, and the demo tokenizer with the tokens that they need."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lisa_dist.data.tokenizer import load_tokenizer


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
    # The last answer is opened by an empty thought, earlier answers are not: a prefix renders unlike the whole. The
    # prompt does not hold it, so the model must write it.
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


OPEN_HEADERS = "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>{{ m.content }}<|eot|>{% endfor %}"

# In the manner of well-known families that trl ships no training template for.
FAMILIES = {
    # Mistral: the system message and the tools stand in the last question.
    "system in the last question": Template(
        "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == messages | map(attribute='role') | list | length - 1 %}"
        "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST] {% if messages[loop.index0:] | selectattr('role', 'equalto', 'user') | list | length == 1 %}"
        "{{ system }}{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        "</s>",
    ),
    # Llama 2: the system message stands in the first question.
    "system in the first question": Template(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        (),
        " </s>",
    ),
    # Command R7B: two special tokens at the end, and the first one of the answer is for the model to write.
    "two tokens at the end": Template(
        "{{ bos_token }}{% for m in messages %}<|turn|>{% if m.role == 'assistant' %}<|bot|><|start_response|>"
        "{{ m.content }}<|end_response|>{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}<|end_turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|><|bot|>{% endif %}",
        ("<|turn|>", "<|bot|>", "<|user|>", "<|system|>", "<|start_response|>", "<|end_response|>", "<|end_turn|>"),
        "<|end_response|><|end_turn|>",
    ),
    # Llama 3 as it first came: an opened answer at the end of any text.
    "always opened": Template(
        OPEN_HEADERS + "<|start|>assistant<|stop|>", ("<|start|>", "<|stop|>", "<|eot|>"), "<|eot|>"
    ),
    # Command A: likewise, and its default system message ends as every turn does.
    "always opened, two tokens at the end": Template(
        "{{ bos_token }}<|turn|><|system|>Be helpful.<|end_turn|>{% for m in messages %}<|turn|>"
        "{% if m.role == 'assistant' %}<|bot|>{{ m.content }}<|end_response|>"
        "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}<|end_turn|>{% endfor %}<|turn|><|bot|>",
        ("<|turn|>", "<|bot|>", "<|user|>", "<|system|>", "<|end_response|>", "<|end_turn|>"),
        "<|end_response|><|end_turn|>",
    ),
    # Zephyr and Granite: the end of the text ends every turn.
    "end of text": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        (),
        "</s>",
    ),
    # Phi 4: headers of three special tokens.
    "separators": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    # Phi 3: the end of the text behind the last turn's own end.
    "an end of text behind the end": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>",
    ),
}

# GLM 4: no token ends a turn, the next header does.
NO_END = Template(
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'tool' %}<|observation|>{% else %}<|{{ m.role }}|>{% endif %}"
    "{{ '\n' + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}\n{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    "",
)
# DeepSeek R1: the prompt begins a thought, the rendered answer has none.
PREFILLED = Template(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    ("<|User|>", "<|Assistant|>", "<think>", "</think>"),
    "</s>",
)


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
