"""Which files a tokenizer is made of: told before a rank starts, so nothing slow is imported here."""

from __future__ import annotations

from pathlib import Path

from lisa_dist.config import UserError
from lisa_dist.runtime.files import check_is_whole

FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
FILES += ["chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"]

# What is in the name of every file that transformers makes a tokenizer of, and how the others end.
WORDS = ("token", "vocab", "merges", "tekken")
ENDINGS = (".model", ".tiktoken", ".bpe")


def check_tokenizer_files(directory: Path, key: str) -> None:
    """Raise :class:`UserError` where a directory holds nothing that a tokenizer could be made of, or files of
    :data:`FILES` that are empty or stand for one of Git LFS; ``key`` is what named it, as ``model.tokenizer=DIR``."""
    names = [file.name.lower() for file in directory.iterdir()]
    if not any(name.endswith(ENDINGS) or any(word in name for word in WORDS) for name in names):
        raise no_tokenizer(key)
    for name in FILES:
        if (directory / name).is_file():
            check_is_whole(directory / name, key)


def no_tokenizer(key: str) -> UserError:
    """Return the error that there are no files of a tokenizer in what ``key`` named, as ``model.tokenizer=DIR``."""
    return UserError(f"{key}: no tokenizer found, needed is tokenizer.json or tokenizer.model")
