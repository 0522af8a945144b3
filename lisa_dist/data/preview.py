"""Looking at the data: samples as text with their trained tokens marked, and prompts to be answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lisa_dist.config import DataConfig, UserError
from lisa_dist.config.data import PREVIEW_START
from lisa_dist.config.paths import check_may_replace, local_path
from lisa_dist.data.encode import UNTRAINED
from lisa_dist.data.prepare import PreparedData
from lisa_dist.data.sequences import Sequences
from lisa_dist.runtime.distributed import is_main

SAMPLES_IN_FILE = 3  # where data.preview does not say how many
TRAINED_STYLE = "bold green"
OPEN, CLOSE = "⟦", "⟧"  # marks of trained text where there are no colours


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, up to where the answer begins, and the answer that the data give."""

    prompt_ids: list[int]
    answer_ids: list[int]


def show_preview(
    config: DataConfig, data: PreparedData, tokenizer: PreTrainedTokenizerBase, console: Console | None = None
) -> None:
    """Print the first training samples and write them to ``data.preview_file``, as the keys ask; rank 0 only.

    Samples are shown as they are before packing.

    Raises:
        UserError: the file can't be written, or holds something else.
    """
    if not is_main() or (config.preview is None and config.preview_file is None):
        return
    rows = data.train.rows[: min(config.preview or SAMPLES_IN_FILE, len(data.train.rows))]
    samples = [(ids.tolist(), labels.tolist()) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]
    console = console or Console()
    for number, (input_ids, labels) in enumerate(samples, start=1):
        trained = sum(label != UNTRAINED for label in labels)
        console.rule(f"sample {number}: {trained} of {len(labels)} tokens trained ({trained / len(labels):.0%})")
        console.print(marked_text(tokenizer, input_ids, labels, brackets=console.color_system is None), soft_wrap=True)
    counts = data.counts
    console.rule(f"trained: {counts.trained_share:.1%} of {counts.tokens} tokens in {counts.used} rows")
    if config.preview_file is not None:
        _write(config.preview_file, samples)


def _write(path: str, samples: list[tuple[list[int], list[int]]]) -> None:
    rows = [{"input_ids": input_ids, "labels": labels} for input_ids, labels in samples]
    file = local_path(path)
    check_may_replace(file, "data.preview_file", PREVIEW_START)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"data.preview_file={path}: can't be written ({error})") from error


def marked_text(
    tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int], *, brackets: bool = False
) -> Text:
    """Decode a sample with its trained tokens coloured, or with ``brackets`` put between ⟦ and ⟧."""
    text = Text()
    shown = ""
    for trained, places in groupby(range(len(labels)), key=lambda place: labels[place] != UNTRAINED):
        end = max(places) + 1
        decoded = str(tokenizer.decode(input_ids[:end], skip_special_tokens=False))  # the whole: pieces lose spaces
        piece, shown = decoded[len(shown) :], decoded
        if trained:
            text.append(f"{OPEN}{piece}{CLOSE}" if brackets else piece, style=TRAINED_STYLE)
        else:
            text.append(piece)
    return text


def sample_questions(sequences: Sequences, count: int) -> list[Question]:
    """Return the first prompt and answer of up to ``count`` rows, spread evenly over the data.

    Rows without a prompt (plain text) are left out.
    """
    questions: list[Question] = []
    for index in np.linspace(0, len(sequences.rows), num=count, endpoint=False, dtype=int).tolist():
        row = sequences.rows[index]
        trained = [label != UNTRAINED for label in row["labels"].tolist()]
        start = trained.index(True)
        stop = trained.index(False, start) if False in trained[start:] else len(trained)
        ids = row["input_ids"].tolist()
        if start > 1:
            questions.append(Question(ids[:start], ids[start:stop]))
    return questions
