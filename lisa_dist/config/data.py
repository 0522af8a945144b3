"""Keys of ``data.*``: what is trained on and how it becomes token sequences."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import date

from lisa_dist.config.errors import UserError, check_auto_or_count, check_choices, check_minimums

FORMATS = ["auto", "alpaca", "chat", "sharegpt", "prompt_completion", "text"]
MOST_PROCESSES = 16  # one process reads the rows for all others, which keeps no more than about these busy
PREVIEW_START = '[{"input_ids": ['  # how what is written to ``data.preview_file`` begins


@dataclass
class DataConfig:
    name: str = "custom"  # the preset's name, for records
    path: str | None = None  # a file, a glob, a Hugging Face directory, a hub id, or builtin:demo
    split: str = "train"  # the split of a directory or a hub data set
    subset: str | None = None  # of a data set that has several: the one to read, by its name
    format: str = "auto"  # alpaca, chat, sharegpt, prompt_completion, text; auto looks at the first row
    columns: dict[str, str] = field(default_factory=dict)  # the format's column -> the file's column
    sequence_length: int = 512  # tokens a sequence
    packing: bool = False  # several samples in one sequence, attention kept apart
    group_by_length: bool = False  # like lengths in one step, which saves padding and changes the order of samples
    preview: int | None = None  # show this many samples with their trained tokens marked
    preview_file: str | None = None  # also write them as JSON
    train_on_prompt: bool = False  # false: only answers carry loss
    validation: str | None = None  # a path, or a fraction of the rows held out
    on_bad_row: str = "error"  # error or skip
    limit: int | None = None  # use only the first rows
    date: str | None = None  # YYYY-MM-DD, for chat templates that write today's; null: the day of tokenizing
    num_proc: str = "auto"  # processes that tokenize, on each machine; auto: the cores available, at most 16
    cache_dir: str | None = None  # where tokenized rows are kept; null: ~/.cache/lisa_dist

    def __post_init__(self) -> None:
        check_choices("data", self, format=FORMATS, on_bad_row=["error", "skip"])
        check_minimums("data", self, sequence_length=2, preview=1, limit=1)
        check_auto_or_count("data.num_proc", self.num_proc)
        try:
            date.fromisoformat(self.date or "2000-01-01")
        except ValueError as error:
            raise UserError(f"data.date={self.date}: must be a day such as 2026-01-31, or null") from error
        fraction = self.validation_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"data.validation={self.validation}: a fraction must lie between 0 and 1, or give a path")

    @property
    def num_processes(self) -> int:
        """How many processes tokenize."""
        if self.num_proc != "auto":
            return int(self.num_proc)
        return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)

    @property
    def validation_fraction(self) -> float | None:
        """The share of rows held out where ``validation`` is a number, else None."""
        try:
            return None if self.validation is None else float(self.validation)
        except ValueError:
            return None
