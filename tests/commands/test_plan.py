"""``lisa-dist plan``: its JSON object, the table, and its refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lisa_dist.cli import main
from lisa_dist.commands.plan import PLAN_STARTS
from lisa_dist.config import Config, UserError
from lisa_dist.config.gpu import Gpu, read_gpu
from lisa_dist.config.loading import conf_dir, vary
from lisa_dist.config.paths import begins_with
from lisa_dist.models.kernels import has_liger
from lisa_dist.planning import changes
from lisa_dist.planning.changes import Plan
from lisa_dist.planning.estimate import Estimate
from lisa_dist.planning.simulation import Trace
from lisa_dist.sharding.ledger import Work
from lisa_dist.sharding.memory_policy import RESERVED_BYTES

ARCHITECTURE = (
    "model.architecture={model_type:llama,vocab_size:4096,hidden_size:512,intermediate_size:1024,"
    "num_hidden_layers:4,num_attention_heads:8,num_key_value_heads:8}"
)
TINY = ["model=custom", ARCHITECTURE, "data.sequence_length=256", "parallel.nproc_per_node=2", "plan.format=json"]
# Each chunk of the head's would be simulated operator by operator.
TINY += ["train.global_batch_size=4", "plan.gpu=rtx4090", "model.loss_chunk=65536"]
SHALLOW = [ARCHITECTURE.replace("num_hidden_layers:4", "num_hidden_layers:2"), "sampler.active_layers=1"]
SHALLOW += ["train.global_batch_size=2"]
SHARING = (
    "model.architecture={model_type:gemma4_text,vocab_size:128,hidden_size:64,intermediate_size:96,num_hidden_layers:4,"
    "num_attention_heads:4,num_key_value_heads:2,head_dim:16,global_head_dim:16,num_kv_shared_layers:2,"
    "layer_types:[sliding_attention,full_attention,sliding_attention,full_attention],"
    "hidden_size_per_layer_input:8,vocab_size_per_layer_input:128}"
)
PARAMETERS = 2 * 4096 * 512 + 4 * (4 * 512**2 + 3 * 512 * 1024 + 2 * 512) + 512
ACTIVE = 2 * 4096 * 512 + 2 * (4 * 512**2 + 3 * 512 * 1024 + 2 * 512) + 512


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def plan(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(["plan", *TINY, *overrides]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_holds_the_figures_that_the_law_and_arithmetic_give(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("method: lisa\n")
    figures = plan(capsys, "method=lisa", "plan.compare=[full]", f"run.dir={tmp_path}")
    left = json.loads((tmp_path / "plan.json").read_text())
    assert left.items() <= figures.items() and left["peak_bytes"], "for the run's report"
    assert begins_with(tmp_path / "plan.json", *PLAN_STARTS), "so that it is written anew"
    assert figures["persistent_bytes"] == {
        "frozen_parameters": 2 * (PARAMETERS - ACTIVE) // 2,
        "active_parameters": 4 * ACTIVE // 2,
        "gradients": 4 * ACTIVE // 2,
        "optimizer_state": 8 * ACTIVE // 2,
    }
    assert figures["kernels"] == ("liger" if has_liger() else "compile")
    assert figures["fits"] and figures["peak_bytes"] > sum(figures["persistent_bytes"].values())
    assert figures["head_room_bytes"] == figures["memory_bytes"] - figures["reserved_bytes"] - figures["peak_bytes"]
    # Two micro-batches of a rank; frozen matrices cost 4 operations a parameter and token, active ones 6; attention
    # has two products forward and five backward, over half of the pairs.
    tokens = 2 * 256
    matrices = PARAMETERS - 4096 * 512 - 9 * 512
    trained = ACTIVE - 4096 * 512 - 5 * 512
    attention = 2 * 4 * 7 * 2 * 256 * 256 * 512 // 2
    assert figures["flops_per_step"] == tokens * (4 * matrices + 2 * trained) + attention
    # Only the trained parameters are reduced, in fp32, once a micro-batch; of two ranks each sends half.
    assert figures["communication_bytes_per_step"]["reduce_scatter"] == 2 * 4 * ACTIVE // 2
    assert figures["tokens_per_second_estimate"] * figures["step_seconds_estimate"] == pytest.approx(4 * 256)
    labels = figures["label_tokens_per_second_estimate"]
    assert labels == pytest.approx(figures["tokens_per_second_estimate"] * 255 / 256)
    (full,) = figures["compare"].values()
    assert full["persistent_bytes"]["frozen_parameters"] == 0 and full["peak_bytes"] > figures["peak_bytes"]


def smaller_gpu(folder: Path, memory_bytes: int) -> str:
    """Write the figures of a GPU with so much memory beyond what is set aside, and return the override for it."""
    text = (conf_dir() / "gpu" / "rtx4090.yaml").read_text()
    memory = read_gpu("rtx4090").memory_bytes
    (folder / "small.yaml").write_text(text.replace(f"{memory}", f"{RESERVED_BYTES + memory_bytes}"))
    return f"plan.gpu={folder / 'small.yaml'}"


def made_up(lines: list[tuple[str, int]], needed: int) -> Any:
    """A maker of plans that needs so many bytes more or fewer than ``needed`` with each change of ``lines``."""

    def make(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        saved = sum(size for change, size in lines if change in (overrides or []))
        config = vary(config, overrides or [])
        trace = Trace(2, 1, {}, 0, {"head": needed - saved}, Work(), config.train.micro_batch_size)
        return Plan(overrides or [], config, gpu, trace, Estimate(1, 0, 0, 1, 1))

    return make


def test_what_does_not_fit_says_by_how_much_and_what_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_two = [*SHALLOW, "train.micro_batch_size=2", "train.global_batch_size=4"]
    needed = plan(capsys, *of_two)["peak_bytes"]
    lines = [("train.micro_batch_size=1", 2 * 10**6), ("parallel.activation_checkpointing=full", 3 * 10**6)]
    monkeypatch.setattr(changes, "make_plan", made_up(lines, needed))
    figures = plan(capsys, *of_two, smaller_gpu(tmp_path, needed - 10**6), "plan.search=true")
    assert not figures["fits"] and figures["head_room_bytes"] == -(10**6)
    assert any("976.6 KiB too much on each rank, 1.9 MiB on the cluster" in note for note in figures["notes"])
    fitting = [change for change in figures["changes"] if change["fits"]]
    assert fitting == figures["changes"][:2] and len(figures["changes"]) == 5
    assert {tuple(change["overrides"]): needed - change["peak_bytes"] for change in fitting} == {
        (change,): saved for change, saved in lines
    }
    kinds = [f"parallel.activation_checkpointing={kind}" for kind in ("none", "selective", "full")]
    assert sorted(entry["overrides"][0] for entry in figures["search"]) == sorted(kinds)


def test_what_does_not_fit_with_every_block_that_auto_may_stream_has_proposals_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = made_up([("train.micro_batch_size=1", RESERVED_BYTES)], RESERVED_BYTES)

    def make(config: Config, gpu: Gpu, overrides: list[str] | None = None) -> Plan:
        made: Plan = planner(config, gpu, overrides)
        if made.config.parallel.offload == "auto":
            raise UserError("parallel.offload=auto: needs 1 KiB more with every frozen block in host memory")
        return made

    monkeypatch.setattr(changes, "make_plan", make)
    monkeypatch.setattr("lisa_dist.commands.plan.make_plan", make)
    one_rank = [*SHALLOW, "parallel.nproc_per_node=1", "parallel.offload=auto", "train.micro_batch_size=2"]
    assert main(["plan", *TINY, *one_rank, smaller_gpu(tmp_path, 10**6)]) == 0
    printed = capsys.readouterr()
    assert "with every frozen block in host memory" in printed.err
    assert "; planned with parallel.offload=frozen\n" in printed.err
    figures = json.loads(printed.out)
    assert not figures["fits"] and figures["changes"]
    assert all(change["overrides"][0] == "parallel.offload=frozen" for change in figures["changes"])


@pytest.mark.soak
def test_changes_of_a_real_plan_save_what_makes_it_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    needed = plan(capsys, *SHALLOW, "train.micro_batch_size=2")["peak_bytes"]
    figures = plan(capsys, *SHALLOW, "train.micro_batch_size=2", smaller_gpu(tmp_path, needed - 10**6))
    fitting = [change for change in figures["changes"] if change["fits"]]
    assert fitting and fitting == figures["changes"][: len(fitting)]
    assert ["train.micro_batch_size=1"] in [change["overrides"] for change in fitting]
    assert all(change["peak_bytes"] < needed for change in fitting)


@pytest.mark.soak
def test_search_finds_the_largest_micro_batch_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one_rank = [*SHALLOW, "parallel.nproc_per_node=1", "train.global_batch_size=1"]  # never a second micro-batch
    needed = plan(capsys, *one_rank, "train.micro_batch_size=3")["peak_bytes"]
    found = plan(capsys, *one_rank, smaller_gpu(tmp_path, needed), "plan.search=true")["search"]
    plain = next(entry for entry in found if "parallel.activation_checkpointing=none" in entry["overrides"])
    assert plain["fits"] and "train.micro_batch_size=3" in plain["overrides"]
    full = next(entry for entry in found if "parallel.activation_checkpointing=full" in entry["overrides"])
    assert full["fits"] and int(full["overrides"][1].partition("=")[2]) > 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.gpu=a100", "plan.gpu=a100: must be one of a100_40gb, a100_80gb"),
        ("plan.compare=[lissa]", "did you mean lisa?"),
        ("parallel.replicate=3", "parallel.replicate=3: must divide the number of ranks, 2"),
        ("parallel.offload=frozen", "Gemma4ForCausalLM gets other gradients"),
    ],
)
def test_mistakes_are_exit_2(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sharing = ["parallel.nproc_per_node=1", SHARING] if "offload" in override else []
    assert main(["plan", *TINY, *sharing, override]) == 2
    assert message in capsys.readouterr().err


def test_every_gpu_of_conf_is_complete_and_names_its_source() -> None:
    files = sorted((conf_dir() / "gpu").glob("*.yaml"))
    assert len(files) >= 8
    for file in files:
        gpu = read_gpu(file.stem)
        assert 1e13 < gpu.matrix_flops < 1e16 and 1e10 < gpu.memory_bytes < 1e12, file
        assert gpu.link_bandwidth_across_nodes < gpu.link_bandwidth_within_node < gpu.memory_bandwidth, file
        assert "# https://" in file.read_text(), file
