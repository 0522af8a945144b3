"""Bytes of optimizer state, period by period: a callback that only freezes and thaws blocks, and lisa_dist.

The callback does what is usually done in other trainers: it sets ``requires_grad``. AdamW makes state for a block the
first time it trains and keeps it for ever. Run it: ``python docs/optimizer_state_growth.py`` (CPU, a minute; needs
accelerate).
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lisa_dist.config import Config
from lisa_dist.data.batches import MicroBatch
from lisa_dist.method.module import begin_period, build_train_module, load_initial_weights
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step

ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
PERIODS, STEPS_A_PERIOD, ACTIVE, TOKENS = 12, 2, 2, 32


class FreezeAndThaw(TrainerCallback):
    """Draws blocks every period, sets ``requires_grad``, and notes the bytes of AdamW's state."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.draws = random.Random(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % STEPS_A_PERIOD == 0:
            blocks = kwargs["model"].model.layers
            chosen = self.draws.sample(range(len(blocks)), ACTIVE)
            for index, block in enumerate(blocks):
                block.requires_grad_(index in chosen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % STEPS_A_PERIOD == 0:
            entries = [entry for entry in kwargs["optimizer"].state.values() if "exp_avg" in entry]
            self.sizes.append(sum(entry["exp_avg"].nbytes + entry["exp_avg_sq"].nbytes for entry in entries))


def naive_sizes() -> list[int]:
    """Return AdamW's bytes after each period under the callback."""
    fields = dict(ARCHITECTURE)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    row = {"input_ids": list(range(TOKENS)), "labels": list(range(TOKENS))}
    callback = FreezeAndThaw()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=PERIODS * STEPS_A_PERIOD, per_device_train_batch_size=1, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=[row] * 64, callbacks=[callback]).train()
    return callback.sizes


def own_sizes() -> list[int]:
    """Return AdamW's bytes after each period of lisa_dist."""
    config = Config()
    config.model.architecture, config.model.init = ARCHITECTURE, "random"
    config.sampler.active_layers = ACTIVE
    distributed.initialize(config.parallel)
    train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device("cpu"))
    ids = torch.arange(TOKENS)[None]
    batch: MicroBatch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    sizes = []
    for period in range(PERIODS):
        begin_period(train_module, period)
        for step in range(STEPS_A_PERIOD):
            train_step(train_module, [batch], period * STEPS_A_PERIOD + step, PERIODS * STEPS_A_PERIOD)
        sizes.append(train_module.optimizer.state_bytes())
    return sizes


if __name__ == "__main__":
    print("period  callback  lisa_dist  (MiB of optimizer state)")
    for period, (naive, own) in enumerate(zip(naive_sizes(), own_sizes()), start=1):
        print(f"{period:6}  {naive / 2**20:8.1f}  {own / 2**20:9.1f}")
