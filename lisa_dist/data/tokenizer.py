"""Loading a tokenizer: a Hugging Face directory or hub id, a bare ``tokenizer.json`` or ``tokenizer.model``."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lisa_dist.config import UserError
from lisa_dist.config.errors import in_one_line
from lisa_dist.config.paths import model_directory
from lisa_dist.data.tokenizer_files import check_tokenizer_files, no_tokenizer
from lisa_dist.runtime.files import read_json_object, stay_offline_where_unreachable

logger = logging.getLogger(__name__)

# What tokenizers call the token that ends a text, where no configuration says it.
USUAL_EOS = ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]"]
USUAL_BOS = ["<s>", "<|begin_of_text|>", "<bos>", "<｜begin▁of▁sentence｜>", "[CLS]"]

# A text by which tokenizers differ that split it otherwise: at digits, capitals, punctuation, blanks, special tokens;
# and how many of the vocabulary are put behind it, for only what could be merged shows where it is split.
PROBE = "What's  12345 tokens, I'LL see\n\n\tx == y; caf\u00e9 \u65e5\u672c{}\n So {}so.\n"
PROBED = 2000

# transformers gives its own function to every template; a caller can't give another.
TODAY = re.compile(r"""\bstrftime_now\(\s*(?P<quote>['"])(?P<form>[^'"]*)(?P=quote)\s*\)""")

# The template for a tokenizer that has none. BOS and the end-of-text token are those of the tokenizer.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check that it can end a text.

    Args:
        path: a directory, a hub id, or ``builtin:demo``. A directory may hold no more than ``tokenizer.json``,
            or a SentencePiece ``tokenizer.model``.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UserError: nothing is there, it can't be loaded, or it has no end-of-text token.
    """
    key = f"model.tokenizer={path}"
    directory = model_directory(path, "model.tokenizer")
    if directory is None:
        stay_offline_where_unreachable()
    else:
        check_tokenizer_files(directory, key)
    folder = directory or Path(path)  # of a hub id no file is here
    try:
        tokenizer = _load(folder, trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that this is no usable tokenizer
        absent = "is no directory here, and from the hub " if directory is None else ""
        raise UserError(f"{key}: {absent}no tokenizer could be loaded ({in_one_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one up where it finds no file
        raise no_tokenizer(key)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer has no eos_token, without which no answer can end; "
            f"set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding carries no label, so any token does
    # transformers would warn of errors at the first long text, which is cut, or warned of and refused, further on.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    _warn_of_passed_over(tokenizer, folder, key)
    return tokenizer


def _warn_of_passed_over(tokenizer: PreTrainedTokenizerBase, folder: Path, key: str) -> None:
    """Say which file of a directory gives another template, or another begin or end, than the one that comes first.

    chat_template.jinja comes before tokenizer_config.json, and with tokens special_tokens_map.json does, unless
    tokenizer_config.json lists the added ones. chat_template.json is read for processors alone.
    """
    if not tokenizer.chat_template and (folder / "chat_template.json").is_file():
        logger.warning(
            "%s: chat_template.json is a processor's and no tokenizer's, so it is passed over; to train and ask with "
            "its template, save that text as chat_template.jinja",
            key,
        )
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        fields = read_json_object(file, key) if file.is_file() else {}
        for name in ("chat_template", "eos_token", "bos_token"):
            said, taken = fields.get(name), getattr(tokenizer, name)
            said = said.get("content") if isinstance(said, dict) else said
            if isinstance(said, str) and isinstance(taken, str) and said.strip() != taken.strip():
                logger.warning(
                    "%s: %s gives another %s than is used, which another file of the directory gives; edit that one, "
                    "or make them say the same",
                    *(key, file.name, name),
                )


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    bare = not (folder / "tokenizer_config.json").is_file()
    if not bare or not (folder / "tokenizer.json").is_file():
        # Models that come with a bare SentencePiece file were trained with BOS before every text.
        options = {"add_bos_token": True} if bare and (folder / "tokenizer.model").is_file() else {}
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **options)
        return _as_its_file_says(loaded, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))  # with the template and tokens of files beside it
    known = tokenizer.get_vocab()
    for name, usual in (("eos_token", USUAL_EOS), ("bos_token", USUAL_BOS)):
        token = next((token for token in usual if token in known), None)
        if getattr(tokenizer, name) is None and token is not None:
            setattr(tokenizer, name, token)
            logger.info("%s has no tokenizer_config.json: taking %s for its %s", folder, token, name)
    return tokenizer


def _as_its_file_says(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of tokenizer.json where the class of transformers makes other tokens of a text than that.

    Classes such as GPT2Tokenizer and Qwen2Tokenizer put their own splitting of texts in the place of the file's
    (https://github.com/huggingface/transformers/issues/45488).
    """
    of_transformers = type(tokenizer).__module__.startswith("transformers.")
    if not tokenizer.is_fast or not of_transformers or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    at_hand = (folder / "tokenizer.json").is_file()
    if not at_hand and (folder.is_dir() or not isinstance(try_to_load_from_cache(str(folder), "tokenizer.json"), str)):
        return tokenizer
    as_filed = PreTrainedTokenizerFast.from_pretrained(str(folder))
    some = range(0, len(as_filed), len(as_filed) // PROBED + 1)
    # What tokenizer_config.json says of a blank before a text its class carries out: before a blank none is put.
    blank = "" if as_filed.init_kwargs.get("add_prefix_space") is None else " "
    ends = [(token or "") + blank for token in (tokenizer.eos_token, tokenizer.bos_token)]
    probe = blank + PROBE.format(*ends) + str(as_filed.decode(list(some), skip_special_tokens=blank != ""))
    with suppress(Exception):  # what transformers gave may not even be able to encode
        if tokenizer(probe, add_special_tokens=False).input_ids == as_filed(probe, add_special_tokens=False).input_ids:
            return tokenizer
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):  # which the class may know by itself
        token = getattr(tokenizer, name)
        if getattr(as_filed, name) is None and token in as_filed.get_vocab():
            setattr(as_filed, name, token)
    logger.warning(
        "%s: %s of transformers makes other tokens of a text than tokenizer.json says, which is followed here",
        folder,
        type(tokenizer).__name__,
    )
    return as_filed


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with its BOS token by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give a tokenizer without a chat template the fallback, and log it; returns whether that was needed.

    The template then belongs to the tokenizer, so an exported model answers in the form that it was trained in.

    Raises:
        UserError: the tokenizer takes control tokens apart.
    """
    _check_keeps_control_tokens(tokenizer)
    if tokenizer.chat_template:
        return False
    bos = "{{ bos_token }}" if adds_bos(tokenizer) else ""
    tokenizer.chat_template = bos + FALLBACK_TEMPLATE
    logger.info(
        "the tokenizer has no chat template; using '### Instruction: ... ### Response: ...%s'", tokenizer.eos_token
    )
    return True


def _check_keeps_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer to which headers and ends of a chat template are text; no text has them as tokens then."""
    if getattr(tokenizer, "split_special_tokens", False):
        raise UserError(
            f"model.tokenizer={tokenizer.name_or_path}: split_special_tokens in tokenizer_config.json must be false "
            "for a chat template, whose control tokens would be taken apart as text"
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
    date: datetime.date | None = None,
) -> str:
    """Render ``messages`` with the chat template; with ``prompt``, up to where the answer begins.

    Args:
        tokenizer: with a chat template.
        messages: role and content, and what else the template may use (tool_calls, reasoning_content, name).
            Where it refuses the arguments of calls as objects, or writes those as Python does, it gets JSON text.
        tools: the functions that may be called, as JSON schemas.
        prompt: open an answer at the end.
        date: what a template that writes the day takes for today; None: today.

    Raises:
        jinja2.TemplateError: the template refuses these messages.
    """

    # None: the tokenizer's own.
    template = None if date is None else template_of_day(str(tokenizer.get_chat_template(tools=tools)), date)

    def write(messages: list[dict[str, Any]]) -> str:
        try:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # templates add and compare what they get
            raise TemplateError(str(error) or type(error).__name__) from error
        if not isinstance(text, str):
            raise TemplateError(f"the chat template gave {type(text).__name__}, not text")
        return text

    try:
        text = write(messages)
    except TemplateError:
        with_text = _with_arguments_as_text(messages)
        if with_text is not None:
            with suppress(TemplateError):
                return write(with_text)
        raise
    in_python = [str(function["arguments"]) for function in _functions(messages) if function["arguments"]]
    if any(arguments in text for arguments in in_python):
        with suppress(TemplateError):
            as_json = write(_with_arguments_as_text(messages) or messages)
            return text if any(arguments in as_json for arguments in in_python) else as_json
    return text


def writes_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the day on which it is rendered, in a form that stands in it."""
    template = tokenizer.chat_template
    named = template.values() if isinstance(template, dict) else [template]
    return any(TODAY.search(text) for text in named)


@lru_cache(maxsize=16)
def template_of_day(template: str, date: datetime.date) -> str:
    """Return a chat template with ``date`` in the place of today's."""
    return TODAY.sub(lambda call: json.dumps(date.strftime(call["form"]), ensure_ascii=False), template)


def _with_arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return the messages with the arguments of calls as JSON text, which some templates want; None without any."""
    changed = copy.deepcopy(messages)
    functions = _functions(changed)
    for function in functions:
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return changed if functions else None


def _functions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the functions that messages call with arguments that are objects."""
    found = [call.get("function") or {} for message in messages for call in message.get("tool_calls") or []]
    return [function for function in found if isinstance(function.get("arguments"), dict)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Return the token ids that a model is asked with: a user's question, or a list of messages.

    The same template as in training, so call :func:`ensure_chat_template` before.

    Raises:
        UserError: the tokenizer takes control tokens apart.
    """
    _check_keeps_control_tokens(tokenizer)
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer(render(tokenizer, messages, prompt=True), add_special_tokens=False).input_ids
