"""Imported by the server that forks processes: what a run needs, which the garbage collector needn't look through."""

from __future__ import annotations

import gc

import peft  # noqa: F401  for adapters
import pytest  # noqa: F401  which modules of tests import
import transformers.models.llama.modeling_llama  # noqa: F401

import lisa_dist.cli
import lisa_dist.launching.local
import lisa_dist.training.loop

lisa_dist.config.loading.load([])
gc.freeze()
gc.enable()
