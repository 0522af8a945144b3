"""What a plan predicts against what real ranks count and what the profiler sees."""

from __future__ import annotations

import dataclasses

import pytest

from lisa_dist.config.loading import load
from lisa_dist.planning.simulation import Trace, simulate
from tests.support.planned import SETTINGS, make_config, measure
from tests.support.ranks import run_on_ranks

# Every setting once, alone or with another, and each family with what its tied weights or capped logits could change.
FAMILIES = {
    "llama": {"lisa", "gathered weights kept, gradients reduced once", "selective checkpointing in fp32"},
    "qwen3 with tied weights": {"full, two micro-batches"},
    "gemma2": {"checkpointing that fits, chosen block by block"},
}
CASES = [
    pytest.param(model, setting, marks=[] if setting in settings else pytest.mark.soak)
    for model, settings in FAMILIES.items()
    for setting in SETTINGS
]


@pytest.mark.parametrize(("model", "setting"), CASES)
def test_predicted_bytes_are_those_of_a_real_rank(model: str, setting: str) -> None:
    config = make_config(model, setting)
    counted, peak = run_on_ranks(2, measure, config)[0]
    predicted: Trace = simulate(config)
    assert predicted.persistent_bytes == counted
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("model", "update"),
    [("mixtral", "low_rank"), pytest.param("llama", "lora", marks=pytest.mark.soak), ("llama", "lora_fa")],
)
def test_projected_experts_and_frozen_adapters_are_planned_as_they_are_stored(model: str, update: str) -> None:
    config = make_config(model, "lisa")
    config.update = load([f"update={update}", "update.rank=4"]).update
    counted, _ = run_on_ranks(2, measure, config)[0]
    assert simulate(config).persistent_bytes == counted


def test_the_bytes_of_one_rank_whose_frozen_blocks_stream_are_planned() -> None:
    config = make_config("llama", "lisa")
    config.parallel = dataclasses.replace(config.parallel, nproc_per_node="1", offload="frozen")
    counted, peak = run_on_ranks(1, measure, config)[0]
    predicted = simulate(config)
    assert predicted.persistent_bytes == counted
    assert predicted.work.link_bytes == 0, "the only block that streams stays in its slot"
    # One block of three is frozen; a CPU has its buffer in the same memory.
    assert predicted.host_bytes == pytest.approx(counted["frozen_parameters"], abs=4096)
    assert predicted.peak_bytes + predicted.host_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.soak), "nf4"])
def test_a_quantised_base_is_planned_as_it_is_stored(kind: str) -> None:
    config = make_config("llama", "lisa")
    config.update = load(["update=lora"]).update
    config.always_active = dataclasses.replace(config.always_active, embeddings=False, norm=False, head=False)
    config.model.quantization = kind
    # The smaller peak of two: a process' first one may hold what is made once, and what earlier tests left.
    (counted, first), (_, second) = (run_on_ranks(2, measure, config)[0] for _ in range(2))
    predicted, peak = simulate(config), min(first, second)
    assert predicted.persistent_bytes == counted
    assert predicted.peak_bytes == pytest.approx(peak, rel=0.1)
