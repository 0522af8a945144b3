"""``lisa-dist bench``: its JSON object, what it counts, and its refusals."""

from __future__ import annotations

import gc
import importlib
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from lisa_dist import cli
from lisa_dist.commands import table
from lisa_dist.commands.bench import command as bench
from lisa_dist.commands.bench.ceilings import measure_ceilings
from lisa_dist.commands.bench.stopwatch import PeakMemory, spread_of
from lisa_dist.commands.bench.targets import FsdpBaseline
from lisa_dist.config import UserError
from lisa_dist.config.loading import load, vary
from lisa_dist.method.module import begin_period
from lisa_dist.models.architecture import head_size
from lisa_dist.models.layer_map import find_layers
from lisa_dist.runtime import distributed
from lisa_dist.training.flops import attention_flops, parameter_flops_per_token, preset_named
from tests.support.bench import BLOCK, BLOCKS, HEAD, HIDDEN, TINY, TOKENS, printed_by_bench
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load


def test_json_holds_speed_parts_and_memory_of_every_method(tmp_path: Path) -> None:
    more = ["bench.format=json", "bench.compare=[full,fsdp_baseline]", "bench.profile=true", f"run.dir={tmp_path}"]
    (printed,) = run_on_ranks(1, printed_by_bench, TINY + more)
    found = json.loads(printed)
    assert {"tokens_per_second", "step_seconds", "peak_bytes", "utilisation"} <= found.keys()
    assert list(found["compare"]) == ["lisa", "full", "fsdp_baseline"]
    for figures in found["compare"].values():
        step, tokens = figures["step_seconds"], 4 * TOKENS
        parts = {key: value for key, value in step["by_part"].items() if key != "switch"}
        assert set(parts) == {"data", "forward", "backward", "optimizer", "other"}
        assert 0 < sum(parts.values()) < 3 * step["median"]
        slowest = step["median"] + step["spread"] + max(0, step["by_part"]["switch"])
        assert tokens / slowest / 3 < figures["tokens_per_second"]
        assert figures["label_tokens_per_second"] == pytest.approx(figures["tokens_per_second"] * (TOKENS - 1) / TOKENS)
        assert figures["utilisation"] is None, "there is no data sheet of a CPU"
        assert figures["measured_steps"] == 4
    ceiling = found["ceilings"]["matrix_flops"]
    assert found["utilisation_of_ceiling"] == pytest.approx(found["flops_per_second"] / ceiling)
    assert found["in_memory"] == "together" and found["data_sheet"] is None
    lisa, full = (2 * (BLOCKS - trained) * BLOCK + 16 * (trained * BLOCK + 2 * HEAD) for trained in (2, BLOCKS))
    assert lisa < found["compare"]["lisa"]["peak_bytes"] < found["compare"]["full"]["peak_bytes"]
    assert full < found["compare"]["full"]["peak_bytes"] < 3 * full
    assert (
        found["compare"]["lisa"]["ratio"]["to"] == "fsdp_baseline" and found["compare"]["lisa"]["ratio"]["median"] > 0
    )
    assert json.loads((tmp_path / "trace_rank_0.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("update=low_rank", "update=low_rank does not; choose update=full_rank"),
        ("sampler=gradient", "sampler=gradient probes the model; choose another sampler"),
    ],
)
def test_what_plain_fsdp_does_not_do_is_refused_by_name(chosen: str, message: str) -> None:
    config = load([*TINY, chosen])
    with pytest.raises(UserError, match=f"bench.compare=fsdp_baseline: trains .*{message}"):
        FsdpBaseline(config, bench.bench_batches(config))


def test_a_sweep_measures_each_line(tmp_path: Path) -> None:
    line = "train.micro_batch_size=1 method=full"
    (printed,) = run_on_ranks(1, printed_by_bench, [*TINY, "bench.format=json", f"bench.sweep=['{line}']"])
    found = json.loads(printed)
    assert (found["method"], found["micro_batch_size"]) == ("lisa", 2)
    (swept,) = found["sweep"]
    assert (swept["overrides"], swept["method"], swept["micro_batch_size"]) == (line, "full", 1)


def counted_flops(overrides: list[str]) -> tuple[list[int], float, float]:
    """The active blocks, the operations a token, those of attention. Runs on a rank."""
    train_module = build_and_load(load(overrides), distributed.device())
    begin_period(train_module, 0)
    return (
        train_module.active.blocks,
        parameter_flops_per_token(train_module),
        attention_flops(train_module, np.full(3, TOKENS)),
    )


def test_operations_follow_from_what_trains() -> None:
    ((_, everything, attention),) = run_on_ranks(1, counted_flops, TINY)
    norm = 6 * HIDDEN
    assert everything == 2 * 6 * BLOCK + 2 * 4 * BLOCK + 6 * HEAD + norm
    assert attention == 12 * BLOCKS * HIDDEN * 3 * TOKENS**2
    frozen = [*TINY, "always_active.embeddings=false", "sampler=fixed", "sampler.blocks=[2]"]
    ((_, stops_early, attention),) = run_on_ranks(1, counted_flops, frozen)
    assert attention == (12 * (BLOCKS - 2) + 4 * 2) * HIDDEN * 3 * TOKENS**2
    assert stops_early == 2 * 2 * BLOCK + 6 * BLOCK + 4 * BLOCK + 6 * HEAD + norm
    without_blocks = [*TINY, "always_active.embeddings=false", "sampler.active_layers=0"]
    ((_, head_alone, _),) = run_on_ranks(1, counted_flops, without_blocks)
    assert head_alone == 4 * 2 * BLOCK + 6 * HEAD + norm


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv"])
def test_a_model_without_attention_has_no_operations_of_it(kind: str) -> None:
    train_module = mock.MagicMock()
    train_module.store.module.config = AutoConfig.for_model(kind)
    train_module.store.layers.blocks, train_module.store.lowest_reached.return_value = range(4), 1
    assert attention_flops(train_module, np.full(3, TOKENS)) == 0


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("kind", "names", "part", "share"),
    [
        pytest.param("gpt2", {}, r"\.wpe\.", 0.0, id="positions are looked up beside tied embeddings"),
        pytest.param("jetmoe", EXPERTS, r"\.experts\.|put_linear", 0.25, id="experts, whatever their module is called"),
        pytest.param(
            "jetmoe", {"num_experts": 4, "top_k_experts": 2}, r"\.experts\.|put_linear", 0.5, id="Gemma 4's names"
        ),
        pytest.param(
            "jetmoe",
            {"ffn_config": SimpleNamespace(moe_num_experts=4, moe_top_k=3)},
            r"\.experts\.|put_linear",
            0.75,
            id="DBRX's",
        ),
        pytest.param("jetmoe", {"moe_num_experts": 4, "moe_topk": 2}, r"\.experts\.|put_linear", 0.5, id="Aria's"),
    ],
)
def test_operations_are_those_of_what_a_token_is_multiplied_with(
    kind: str, names: dict[str, Any], part: str, share: float
) -> None:
    config = AutoConfig.for_model(kind, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **EXPERTS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    train_module = mock.MagicMock()
    store = train_module.store
    store.layers, store.parameter, store.module.config = (
        find_layers(model),
        model.get_parameter,
        SimpleNamespace(**names),
    )
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    store.names, store.lowest_reached.return_value, train_module.optimizer.parameters = list(counted), 0, {}
    expected = 4 * sum((share if re.search(part, name) else 1.0) * count for name, count in counted.items())
    assert expected < 4 * sum(counted.values()) and parameter_flops_per_token(train_module) == expected


def test_of_layers_whose_heads_differ_the_largest_is_what_kernels_must_take() -> None:
    assert head_size(AutoConfig.for_model("gemma4_text", head_dim=16, global_head_dim=32)) == 32


class Heterogeneous(SimpleNamespace):
    """As transformers 5.24 answers for layers that have other numbers of heads (dots.3)."""

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError


LAYERS = [SimpleNamespace(num_attention_heads=heads, head_dim=heads) for heads in (2, 4)]


@pytest.mark.parametrize(
    ("architecture", "widths"),
    [
        (SimpleNamespace(num_attention_heads=2, hidden_size=8, layer_types=["linear_attention", "attention"]), 8),
        (SimpleNamespace(num_attention_heads=2, hidden_size=8, layer_types=["hybrid", "hybrid_sliding"]), 16),
        (Heterogeneous(per_layer_config=LAYERS), 4 + 16),
    ],
)
def test_attention_is_counted_of_each_layer_that_has_some(architecture: Any, widths: int) -> None:
    train_module = mock.MagicMock()
    train_module.store.module.config = architecture
    train_module.store.layers.blocks, train_module.store.lowest_reached.return_value = range(2), 0
    assert attention_flops(train_module, np.full(3, TOKENS)) == 12 * widths * 3 * TOKENS**2


def refusals(lines: list[list[str]]) -> list[str]:
    """What the user is told of each line of overrides. Runs on a rank."""
    told = []
    for overrides in lines:
        with pytest.raises(UserError) as caught:
            bench.run(load([*TINY, *overrides]))
        told.append(str(caught.value))
    return told


def test_mistakes_are_refused() -> None:
    lines = {
        "bench.compare=ful: must be one of": ["bench.compare=[ful]"],
        "run.dir=null": ["bench.profile=true"],
        "bench.sweep": ["bench.compare=[full]", "bench.sweep=['train.seed=1']"],
        "train.global_batch_size=3": ["train.global_batch_size=3"],
    }
    (told,) = run_on_ranks(1, refusals, list(lines.values()))
    assert all(text.startswith(start) for text, start in zip(told, lines)), told
    with pytest.raises(UserError, match="model=demo"):
        vary(load(TINY), ["model=demo"])


def test_ranks_log_beside_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lisa_dist.launching.rank_server.start_rank_server", lambda: None)
    monkeypatch.setattr("lisa_dist.launching.local.launch_ranks", lambda *arguments: seen.append(arguments) or 0)
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["bench", *TINY]) == 0
    ((config, entry, logs),) = seen
    assert (config.run.dir, entry) == (None, table.bench)
    assert not logs.exists(), "logs of a bench that went well are not kept"


def test_the_median_and_the_distance_of_the_quartiles() -> None:
    assert spread_of([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "spread": 2.0}
    assert spread_of([2.0]) == {"median": 2.0, "spread": 0.0}


def test_peak_memory_on_the_cpu_is_the_most_that_was_held_at_a_time() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        loading = torch.ones(9000, dtype=torch.float64)
        kept = torch.ones(50, dtype=torch.float64)
        del loading
        peak.start()
        first = torch.ones(1000, dtype=torch.float64)
        del first
        second = torch.ones(600, dtype=torch.float64)
        third = torch.ones(700, dtype=torch.float64)
    assert peak.bytes == kept.nbytes + second.nbytes + third.nbytes


def test_a_gpu_is_found_among_the_presets_by_its_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100 SXM", "H100": "H100 SXM", "NVIDIA RTX A6000": "RTX A6000",
        "NVIDIA A100-SXM4-80GB": "A100 SXM, 80 GB", "NVIDIA A100-SXM4-40GB": "A100 SXM, 40 GB",
        "NVIDIA L4": "L4", "NVIDIA L40S": "L40S", "NVIDIA B200": "B200 SXM", "NVIDIA GB200": "GB200",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "RTX PRO 6000 Blackwell",
    }  # fmt: skip
    for name, expected in names.items():
        found = preset_named(name)
        assert found is not None and f" {expected}," in f"{found.description},", name
    assert preset_named("NVIDIA L40") is preset_named("Some GPU") is None


def measured_without_room(overrides: list[str]) -> tuple[dict[str, Any], list[tuple[str, int]], list[int]]:
    """The result, what was built while how many others were in memory, and how many are at the end. Runs on a rank."""
    importlib.import_module("transformers.trainer")  # the peer's
    gc.collect()
    gc.freeze()  # what is there before any target needs no look at each of them
    alive: list[weakref.ref[Any]] = []
    built = []

    def noted(name: str, build: Any) -> Any:
        def entered(config: Any, batches: Any) -> Any:
            gc.collect()
            built.append((name, sum(target() is not None for target in alive)))
            target = build(config, batches)
            alive.append(weakref.ref(target.model))
            return target

        return entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lisa_dist.commands.bench.rounds.free_memory_bytes", lambda: 0)
        patch.setattr(bench, "MethodTarget", noted("method", bench.MethodTarget))
        patch.setitem(bench.PEERS, "peer_full", noted("peer_full", bench.PEERS["peer_full"]))
        found = json.loads(printed_by_bench([*overrides, "bench.compare=[peer_full]", "bench.format=json"]))
    gc.collect()
    return found, built, [sum(target() is not None for target in alive)]


def test_targets_that_do_not_fit_together_are_alone_in_memory_and_built_anew_each_round() -> None:
    ((found, built, left),) = run_on_ranks(1, measured_without_room, [*TINY, "bench.rounds=2"])
    assert found["in_memory"] == "alone" and found["rounds"] == 2
    assert built[0] == ("method", 0) and {others for _, others in built} == {0}
    assert [name for name, _ in built[1:]] == ["method", "peer_full", "peer_full", "method"]
    assert left == [0]
    assert found["compare"]["peer_full"]["measured_steps"] == found["compare"]["lisa"]["measured_steps"] == 4
    assert found["compare"]["peer_full"]["ratio"]["median"] > 0


def test_a_method_whose_backward_ends_at_a_block_is_measured_over_three_draws() -> None:
    more = ["method=badam", "bench.format=json", "bench.steps=6", "model.attention=eager"]
    (printed,) = run_on_ranks(1, printed_by_bench, [*TINY, *more])
    found = json.loads(printed)
    assert found["rounds"] == 3, "two rounds asked for, one for each draw made"
    lowest = {name: draw["blocks"] for name, draw in found["draws"].items()}
    assert lowest == {"low": [0], "middle": [2], "high": [3]}
    seconds = [draw["step_seconds"] for draw in found["draws"].values()]
    assert found["step_seconds"]["median"] == pytest.approx(sum(seconds) / 3)


def test_the_ceilings_are_measured_in_the_dtype_of_the_arithmetic() -> None:
    dtypes = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.mm:
                dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watching():
        found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert set(dtypes) == {torch.float32}
    assert found.keys() == {"matrix_flops", "copy_bytes_per_second"}
    assert 1e8 < found["matrix_flops"] < 1e13 and 1e8 < found["copy_bytes_per_second"] < 1e12
