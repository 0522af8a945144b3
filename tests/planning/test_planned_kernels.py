"""The kernels that are planned, and what they save."""

from __future__ import annotations

import copy
import functools
from unittest import mock

import pytest

from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.models import kernels
from lisa_dist.planning.simulation import Trace, simulate

HIDDEN, INTERMEDIATE, LENGTH, SEQUENCES = 64, 160, 512, 2


def configured(chosen: str, model_type: str = "llama") -> Config:
    architecture = (
        f"{{model_type:{model_type},vocab_size:64,hidden_size:{HIDDEN},intermediate_size:{INTERMEDIATE},"
        "num_hidden_layers:9,num_attention_heads:4,num_key_value_heads:4}"
    )
    sizes = [f"data.sequence_length={LENGTH}", f"train.micro_batch_size={SEQUENCES}", "train.global_batch_size=2"]
    keys = ["model=custom", f"model.architecture={architecture}", "data=custom", "sampler.active_layers=1"]
    return load([*keys, *sizes, f"model.kernels={chosen}", "model.loss_chunk=64", "parallel.nproc_per_node=1"])


@functools.cache
def planned(chosen: str, installed: bool = True, model_type: str = "llama") -> Trace:
    """The plan of a shallow model, where Liger's package is ``installed`` or not."""
    with mock.patch.object(kernels, "has_liger", lambda: installed):
        return simulate(configured(chosen, model_type), 2)


def of_a_frozen_block(config: Config) -> tuple[int, int]:
    """Bytes that it adds to the peak, and bytes that its operators move."""
    more, fewer = (simulate(config, depth) for depth in (4, 3))
    return more.peak_bytes - fewer.peak_bytes, more.work.other_bytes - fewer.work.other_bytes


def test_a_frozen_block_keeps_less_by_what_fused_kernels_do_not_keep() -> None:
    (eager, moved_by_eager), (compiled, moved) = (of_a_frozen_block(configured(each)) for each in ("eager", "compile"))
    # Two norms keep their input in bfloat16 instead of float32, and the activation of the gate is not kept.
    saved = SEQUENCES * LENGTH * (2 * 2 * HIDDEN + 2 * INTERMEDIATE)
    assert eager - compiled == pytest.approx(saved, rel=0.02)
    assert moved < 0.5 * moved_by_eager


def test_a_second_micro_batch_needs_no_second_gradient_of_the_head() -> None:
    once = configured("compile")
    once.model.architecture["vocab_size"] = 1 << 16  # so that a gradient of the head is most of what there is
    once.always_active.embeddings = False  # whose gradient waits beside the second micro-batch
    twice = copy.deepcopy(once)
    twice.train.global_batch_size *= 2
    peaks = [simulate(config, 3).peak_bytes for config in (once, twice)]
    assert peaks[0] <= peaks[1] < peaks[0] + 4 * HIDDEN * (1 << 16) // 4


def test_kernels_change_no_product() -> None:
    traces = [planned(each) for each in ("eager", "auto", "compile")]
    assert [trace.kernels for trace in traces] == ["eager", "liger", "compile"]
    eager, liger, compiled = (trace.work for trace in traces)
    assert eager.flops == liger.flops == compiled.flops
    assert eager.attention_flops == liger.attention_flops == compiled.attention_flops


@pytest.mark.parametrize(
    ("wanted", "installed", "model_type", "found"),
    [
        ("auto", True, "llama", "liger"),
        ("auto", False, "llama", "compile"),
        ("auto", True, "gpt_neox", "compile"),
        ("eager", True, "llama", "eager"),
    ],
)
def test_auto_is_planned_as_on_a_gpu_with_the_packages_of_here(
    wanted: str, installed: bool, model_type: str, found: str
) -> None:
    assert planned(wanted, installed, model_type).kernels == found
