"""A tiny model for bench, its sizes, and what bench prints."""

from __future__ import annotations

import contextlib
import io

from lisa_dist.commands.bench import command as bench
from lisa_dist.config.loading import load

VOCABULARY, HIDDEN, INTERMEDIATE, BLOCKS, TOKENS = 96, 32, 48, 4, 24
TINY = [
    "model=custom",
    f"model.architecture={{model_type:llama,vocab_size:{VOCABULARY},hidden_size:{HIDDEN},"
    f"intermediate_size:{INTERMEDIATE},num_hidden_layers:{BLOCKS},num_attention_heads:2,num_key_value_heads:2}}",
    "model.init=random",
    "data=custom",
    f"data.sequence_length={TOKENS}",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "parallel.cpu_threads=1",
    "bench.steps=4",
    "bench.rounds=2",
    "bench.warmup_steps=1",
]
BLOCK = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN  # parameters
HEAD = VOCABULARY * HIDDEN


def printed_by_bench(overrides: list[str]) -> str:
    """What bench prints on stdout. Runs on a rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert bench.run(load(overrides)) == 0
    return output.getvalue()
