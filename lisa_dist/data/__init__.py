"""Data: sources, formats, chat templates and loss masks, packing, and resumable batches that ranks share."""

from lisa_dist.data.batches import GlobalBatches, MicroBatch, label_tokens
from lisa_dist.data.counts import DataCounts
from lisa_dist.data.encode import UNTRAINED
from lisa_dist.data.prepare import PreparedData, prepare_data
from lisa_dist.data.preview import Question, sample_questions, show_preview
from lisa_dist.data.sequences import Sequences
from lisa_dist.data.tokenized import TokenizedRows, tokenize
from lisa_dist.data.tokenizer import encode_prompt, ensure_chat_template, load_tokenizer

__all__ = [
    "UNTRAINED",
    "DataCounts",
    "GlobalBatches",
    "MicroBatch",
    "PreparedData",
    "Question",
    "Sequences",
    "TokenizedRows",
    "encode_prompt",
    "ensure_chat_template",
    "label_tokens",
    "load_tokenizer",
    "prepare_data",
    "sample_questions",
    "show_preview",
    "tokenize",
]
