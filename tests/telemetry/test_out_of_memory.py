"""Memory that runs out ends in one sentence: where, how much, and what needs less."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lisa_dist.commands.table import COMMANDS
from lisa_dist.config import Config, OutOfMemoryError, RunConfig
from lisa_dist.config.loading import load, vary
from lisa_dist.telemetry.out_of_memory import PREPARATION, advice, amounts, is_out_of_memory
from lisa_dist.training import loop
from tests.support.ranks import run_on_ranks
from tests.support.runs import make_config
from tests.support.tiny import read_summary

TOO_MUCH = 2**50  # bytes: 1 PiB
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 8.62 MiB "
    "is free. Process 1 has 79.14 GiB memory in use."
)


def error_of(action: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("error", "asked", "free"),
    [
        (error_of(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)), "1024.0 TiB", None),
        (error_of(lambda: np.empty(TOO_MUCH, dtype=np.uint8)), "1.00 PiB", None),
        (torch.OutOfMemoryError(CUDA), "20.00 MiB", "8.62 MiB"),
        (MemoryError(), None, None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None, None),
        (RuntimeError("CUDA error: out of memory"), None, None),
    ],
    ids=["torch on a CPU", "numpy", "torch on a GPU", "python", "system", "driver"],
)
def test_every_kind_of_error_is_known(error: BaseException, asked: str | None, free: str | None) -> None:
    assert is_out_of_memory(error)
    assert amounts(str(error)) == (asked, free)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(errno.ENOSPC, "full"), ValueError()])
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def keys_of(config: Config, phase: str = "forward of step 1", on_gpu: bool = True, ranks: int = 1) -> list[str]:
    """The advised overrides, each of which training would take."""
    listed = advice(config, phase, ranks=ranks, local_ranks=ranks, on_gpu=on_gpu)
    listed = listed.partition(": ")[2].partition("; ")[0]
    assert listed.endswith("more ranks")
    overrides = [part.split(" ")[0] for part in listed.split(", ")[:-1]]
    vary(config, overrides)
    return overrides


def test_keys_are_advised_in_the_order_to_try_them() -> None:
    config = load(["model=llama2_7b", "data=custom", "train.micro_batch_size=6", "data.sequence_length=2048"])
    assert keys_of(config) == [
        "train.micro_batch_size=3",  # not 4, with which a global batch of 6 x ranks could not be had
        "parallel.activation_checkpointing=full",
        "model.loss_chunk=1024",
        "parallel.offload=frozen",
        "data.sequence_length=1024",
    ]
    assert "parallel.offload=frozen" not in keys_of(config, on_gpu=False), "it would be the same memory"


def test_inputs_of_all_micro_batches_can_be_given_up() -> None:
    overrides = ["model=llama2_7b", "train.global_batch_size=8", "parallel.offload=frozen", "parallel.block_major=true"]
    found = keys_of(load(overrides))
    assert found.index("parallel.offload_activations=true") < found.index("parallel.block_major=false")
    assert "parallel.offload_activations=true" not in keys_of(load(overrides), on_gpu=False), "the same memory"
    assert "parallel.block_major=false" not in keys_of(load(overrides), "optimizer of step 1")


def test_what_is_at_its_limit_or_refused_or_without_effect_is_not_advised() -> None:
    overrides = ["model=llama2_7b", "data.sequence_length=128", "parallel.activation_checkpointing=full"]
    assert keys_of(load([*overrides, "parallel.offload=all"])) == ["data.sequence_length=64"]
    everything = load([*overrides, "method=full"])
    assert keys_of(everything) == ["parallel.offload=all", "data.sequence_length=64"], "nothing is frozen"
    at_once = load([*overrides, "train.micro_batch_size=8", "train.global_batch_size=8", "optimizer.in_backward=true"])
    assert not any(key.startswith("train.") for key in keys_of(at_once)), "it would have to accumulate gradients"


@pytest.mark.parametrize("phase", [PREPARATION, "optimizer of step 3", "the checkpoint of step 5"])
def test_where_there_are_no_activations_other_keys_are_advised(phase: str) -> None:
    config = load(["model=llama2_7b", "train.micro_batch_size=8", "sampler.active_layers=4"])
    assert keys_of(config, phase) == ["parallel.offload=frozen", "sampler.active_layers=2"]


def test_the_next_command_plans_the_run_on_its_ranks() -> None:
    config = replace(load(["model=llama2_7b"]), run=RunConfig(dir="runs/a run"))
    assert advice(config, "forward", ranks=16, local_ranks=8, on_gpu=True).endswith(
        "added to: lisa-dist plan 'run.dir=runs/a run' parallel.nproc_per_node=8 parallel.nodes=2 plan.gpu=NAME"
    )


def test_a_command_beside_training_is_advised_what_it_has(tmp_path: Path) -> None:
    config = load(["model=llama2_7b", "train.micro_batch_size=8", "data.sequence_length=2048"])
    assert keys_of(config, "evaluate") == [
        "train.micro_batch_size=4", "model.loss_chunk=1024", "parallel.offload=frozen", "data.sequence_length=1024",
    ]  # fmt: skip
    assert keys_of(config, "generate") == ["parallel.offload=frozen"]
    for name in ("evaluate", "generate"):
        assert "lisa-dist plan" not in advice(config, name, ranks=1, local_ranks=1, on_gpu=True)
    assert keys_of(config, "bench") == keys_of(config)
    planned = advice(config, "bench", ranks=1, local_ranks=1, on_gpu=False)
    assert planned.endswith(
        "lisa-dist plan ... parallel.nproc_per_node=1, with the settings given here in the place of the dots"
    )


@pytest.mark.parametrize("name", ["bench", "evaluate", "generate"])
def test_every_command_ends_in_the_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> int:
        raise torch.OutOfMemoryError(CUDA)

    folder = "lisa_dist.commands.bench.command" if name == "bench" else f"lisa_dist.commands.{name}"
    monkeypatch.setattr(f"{folder}.run", run)
    with pytest.raises(OutOfMemoryError, match=f"^out of memory in {name}, 20.00 MiB were asked for and 8.62 MiB were"):
        COMMANDS[name].function(load([]))


def train_hungrily(config: Config, hungry_step: int) -> str:
    """Train on this rank; in the forward of ``hungry_step`` (from 0) a block asks for more than there is."""
    train_step, hungry = loop.train_step, False

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        nonlocal hungry
        hungry = number == hungry_step
        return train_step(train_module, micro_batches, number, *rest, **more)

    def eat(module: torch.nn.Module, inputs: Any) -> None:
        if hungry and isinstance(module, LlamaDecoderLayer):
            torch.empty(TOO_MUCH, dtype=torch.uint8)

    hook = register_module_forward_pre_hook(eat)  # a patched forward would live on in classes that are made of it
    try:
        with mock.patch.object(loop, "train_step", step), pytest.raises(OutOfMemoryError) as caught:
            loop.train(config)
    finally:
        hook.remove()
    return str(caught.value)


def test_a_step_that_does_not_fit_ends_in_a_sentence_and_the_log_has_the_traceback(tmp_path: Path) -> None:
    config = make_config(tmp_path, "train.global_batch_size=8", "train.micro_batch_size=4")
    sentences = run_on_ranks(2, train_hungrily, config, 1)
    for rank, sentence in enumerate(sentences):
        assert sentence.startswith("out of memory in forward of step 2, 1024.0 TiB were asked for and "), sentence
        assert "free now; what needs less, in the order to try it: train.micro_batch_size=2 (now 4), " in sentence
        assert sentence.endswith(f"added to: lisa-dist plan run.dir={tmp_path} parallel.nproc_per_node=2")
        log = (tmp_path / "logs" / f"rank_{rank}.log").read_text()
        assert "Traceback" in log and "in eat" in log and "DefaultCPUAllocator: can't allocate memory" in log
    assert (read_summary(tmp_path) or {})["exit_reason"] == f"failed: OutOfMemoryError: {sentences[0]}"


def train_within(config: Config, spare: int) -> str:
    """Train on this rank, which may take ``spare`` bytes more than it has before the first forward."""
    log_first_period = loop.log_first_period

    def within_limit(run: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, resource.RLIM_INFINITY))
        log_first_period(run)

    try:
        with mock.patch.object(loop, "log_first_period", within_limit), pytest.raises(OutOfMemoryError) as caught:
            loop.train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(caught.value)


def test_memory_that_really_runs_out_is_found_by_the_dry_run(tmp_path: Path) -> None:
    """The address space is limited, so that an allocation of the forward pass fails as it would on a full machine."""
    long = ["data.sequence_length=2048", "data.packing=true", "train.global_batch_size=8", "train.micro_batch_size=8"]
    config = make_config(tmp_path, *long, "model.loss_chunk=16384")
    (sentence,) = run_on_ranks(1, train_within, config, 64 * 2**20)
    assert sentence.startswith("out of memory in the dry run of the longest micro-batch of step 1, "), sentence
    free = re.search(r"MiB were asked for and ([\d.]+) MiB are free now; ", sentence)
    assert free is not None and float(free[1]) <= 64, "what the limit leaves, not what the machine has"
    assert "train.micro_batch_size=4 (now 8), parallel.activation_checkpointing=full (now none), " in sentence
