"""What the loop records of its steps: which tokens, which seconds, and whose."""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.config import Config, StorageError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.batches import GlobalBatches
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.tokenizer import load_tokenizer
from lisa_dist.method.module import begin_period, build_train_module, load_initial_weights
from lisa_dist.telemetry import recorder
from lisa_dist.telemetry.records import read_rows, read_summary
from lisa_dist.training import loop, record
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    assert_same_run,
    cut_back,
    final_tensors,
    make_config,
    metrics,
    resuming,
    train,
    train_here,
)
from tests.support.small_training import make_config as make_small_config
from tests.support.small_training import make_global_batches

SECONDS = {"train_step": 1.0, "begin_period": 10.0, "dry_run_batch": 100.0, "evaluate": 1000.0}
WAIT, SAVE, RATE = 0.25, 10_000.0, 2e9


def config_of(run_dir: Path, *overrides: str) -> Config:
    """Two epochs of sixteen rows in four steps, two periods, with a validation after every step."""
    settings = ["data.limit=20", "data.validation=0.2", "train.max_steps=null", "train.epochs=2"]
    return make_config(run_dir, *settings, "train.global_batch_size=8", "train.eval_every=1", *overrides)


def train_by_a_clock_of_its_own(config: Config) -> None:
    """Train where each part takes its seconds by a clock that nothing else moves, on a GPU that is known."""
    clock = [0.0]

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            clock[0] += seconds
            return function(*arguments, **named)

        return call

    def iterate(self: GlobalBatches, *arguments: Any) -> Iterator[Any]:
        for micro_batches in original(self, *arguments):
            clock[0] += WAIT
            yield micro_batches

    original = GlobalBatches.iterate
    with ExitStack() as stack:
        for name, seconds in SECONDS.items():
            stack.enter_context(mock.patch.object(loop, name, taking(seconds, getattr(loop, name))))
        stack.enter_context(mock.patch.object(CheckpointSaver, "save", taking(SAVE, CheckpointSaver.save)))
        stack.enter_context(mock.patch.object(GlobalBatches, "iterate", iterate))
        stack.enter_context(mock.patch.multiple(loop, now=lambda: clock[0], perf_counter=lambda: clock[0]))
        stack.enter_context(mock.patch.object(record, "peak_rate", lambda device: RATE))
        stack.enter_context(mock.patch.object(record, "step_flops", lambda train_module, lengths: 10.0 * lengths.sum()))
        train_here(config)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run whose parts took known seconds."""
    run_dir = tmp_path_factory.mktemp("clocked")
    run_on_ranks(1, train_by_a_clock_of_its_own, config_of(run_dir))
    return [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]


def test_a_step_takes_the_wait_for_its_data_and_nothing_of_what_is_around_it(rows: list[dict[str, Any]]) -> None:
    assert [row["data_seconds"] for row in rows] == [WAIT] * 4
    assert [row["step_seconds"] for row in rows] == [1 + WAIT] * 4, "the first is no longer than the others"
    assert [row.get("switch_seconds") for row in rows] == [10.0, None, 10.0, None]
    for row in rows:
        assert row["tokens_per_second"] == row["tokens"] / row["step_seconds"]
        assert row["label_tokens_per_second"] == row["label_tokens"] / row["step_seconds"]
        assert row["mfu"] == pytest.approx(10 * row["tokens"] / row["step_seconds"] / RATE)


def test_the_keys_of_a_row(rows: list[dict[str, Any]]) -> None:
    keys = ["step", "epoch", "period", "active_layers", "loss", "lr", "grad_norm", "tokens", "label_tokens"]
    keys += ["tokens_per_second", "label_tokens_per_second", "step_seconds", "data_seconds", "part_seconds"]
    keys += ["peak_memory_gib", "mfu"]
    assert set(rows[1]) == set(keys)


def test_a_row_is_of_all_steps_since_the_row_before(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.log_every=3", "checkpoint.every=0")
    run_on_ranks(1, train_by_a_clock_of_its_own, config)
    third, last = (row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row)
    assert (third["step"], last["step"]) == (3, 4), "the last step has a row though none is due"
    for key in ("tokens", "label_tokens"):
        assert third[key] == sum(row[key] for row in rows[:3]) and last[key] == rows[3][key]
    for key in ("loss", "grad_norm", "lr", "epoch", "period", "active_layers"):
        assert (third[key], last[key]) == (rows[2][key], rows[3][key]), "of this very step"
    assert (third["step_seconds"], third["data_seconds"]) == (1 + WAIT, WAIT), "of one step"
    assert third["switch_seconds"] == 20.0 and "switch_seconds" not in last, "two periods began"
    assert third["tokens_per_second"] == pytest.approx(third["tokens"] / 3 / (1 + WAIT))
    assert third["mfu"] == pytest.approx(10 * third["tokens"] / 3 / (1 + WAIT) / RATE)


def test_the_parts_of_a_step_are_in_its_own_row_though_that_is_written_later(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.eval_every=0", "checkpoint.every=0", "sampler.period=4")
    run_on_ranks(1, train_here, config)
    for row in (row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row):
        assert 0 < row["part_seconds"]["backward"] < sum(row["part_seconds"].values()) < row["step_seconds"], row[
            "step"
        ]


def test_a_resume_counts_the_tokens_of_steps_without_a_row(tmp_path: Path) -> None:
    settings = ("train.log_every=3", "checkpoint.every=2")
    train(1, config_of(tmp_path / "whole", *settings))
    cut_back(tmp_path / "whole", tmp_path / "cut", 2)
    train(1, resuming(config_of(tmp_path / "cut", *settings)))
    assert [row["step"] for row in metrics(tmp_path / "whole") if "loss" in row] == [2, 3, 4]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def timeouts_of_steps(config: Config) -> list[float]:
    """Train, and note for each step the seconds that a collective may take. Runs on every rank."""
    seen = []
    train_step = loop.train_step

    def step(*arguments: Any, **named: Any) -> Any:
        assert dist.group.WORLD is not None
        seen.append(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
        return train_step(*arguments, **named)

    with mock.patch.object(loop, "train_step", step):
        train_here(config)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=120))  # as the pool had it
    return seen


def test_the_first_step_of_a_start_may_take_longer_than_the_others(tmp_path: Path) -> None:
    config = config_of(tmp_path, "parallel.timeout=77", "train.eval_every=0", "train.epochs=1")
    assert run_on_ranks(2, timeouts_of_steps, config) == [[3600.0, 77.0]] * 2


def test_tokens_are_counted_without_padding_and_speeds_are_medians(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.epochs=1", "train.micro_batch_size=4", "train.sample_prompts=1")
    data = prepare_data(config.data, load_tokenizer("builtin:demo"), seed=0)
    expected = int(data.train.lengths.sum())
    labels = sum(int((data.train[index].labels != -100).sum()) for index in range(len(data.train)))
    assert labels < expected and len(set(data.train.lengths.tolist())) > 2, "else the test would show nothing"
    assert run_on_ranks(2, train_here, config) == [0, 0]
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert (sum(row["tokens"] for row in rows), sum(row["label_tokens"] for row in rows)) == (expected, labels)
    assert all("mfu" not in row for row in rows), "nobody knows what a CPU could do"
    summary = read_summary(RunDirectory(tmp_path))
    assert (summary["tokens_seen"], summary["label_tokens_seen"], summary["num_blocks"]) == (expected, labels, 5)
    first, last = read_rows(tmp_path / "events.jsonl")
    assert [(row["event"], row["step"]) for row in (first, last)] == [("answers", 0), ("answers", rows[-1]["step"])]
    assert first["answers"][0]["expected"] == last["answers"][0]["expected"] != ""
    layers = read_rows(tmp_path / "layers.jsonl")
    assert all(row["num_blocks"] == 5 for row in layers)
    for key in ("forward", "backward", "optimizer"):
        assert all(0 < row["part_seconds"][key] < row["step_seconds"] for row in rows)
    assert all(sum(row["part_seconds"].values()) < row["step_seconds"] for row in rows)
    trained = [set(map(str, row["active_layers"])) for row in layers]
    for row, before, now in zip(layers, [set(), *trained], trained):
        assert set(row["weight_norms"]) == before | now, "of those that end a period and those that begin one"
    weights = {name: tensor for name, tensor in final_tensors(tmp_path).items() if name.startswith("weights/")}
    assert set(summary["weight_norms"]) == trained[-1]
    for block, norm in summary["weight_norms"].items():
        own = [tensor.float() for name, tensor in weights.items() if f".layers.{block}." in name]
        assert norm == pytest.approx(float(sum(tensor.square().sum() for tensor in own)) ** 0.5, rel=1e-5)
    for key in ("tokens_per_second", "label_tokens_per_second"):
        assert summary[key] == statistics.median(row[key] for row in rows)
    assert summary["peak_memory_gib"] >= max(row["peak_memory_gib"] for row in rows)
    assert summary["wall_seconds"] > sum(row["step_seconds"] for row in rows)
    assert summary["law"] == "(2 P_f + 16 P_a) / 2"
    counted = sum(summary["persistent_bytes"].values())  # rank 0 has the longer of uneven shards
    assert summary["law_bytes"] == pytest.approx(counted, rel=5e-3) and summary["law_bytes"] <= counted
    # A resume that finds nothing to do says the same of the run.
    assert run_on_ranks(2, train_here, resuming(config)) == [0, 0]
    again = read_summary(RunDirectory(tmp_path))
    for key in ("tokens_per_second", "tokens_seen", "num_blocks", "trained_parameters", "persistent_bytes"):
        assert again[key] == summary[key]


LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")


class Looks(TorchDispatchMode):
    """Collects the looks at a tensor's value, for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        by_mask = name == "index" and any(place is not None and place.dtype == torch.bool for place in args[1])
        if name in LOOKS or by_mask:
            where = "".join(traceback.format_stack(limit=8))
            # Labels are counted in host memory, where the batch is. Whether rows are packed, transformers' mask looks
            # up by itself, once a forward pass.
            if "in label_tokens" not in where and "in find_packed_sequence_indices" not in where:
                self.made.append(f"{name}: {where}")
        return operator(*args, **(kwargs or {}))


def looks_of_a_step(kind: str, packing: bool) -> tuple[list[str], int]:
    """The looks of a step of two micro-batches, and how often numbers were asked for. Runs on one rank."""
    config = make_small_config(precision={"frozen": "bfloat16", "compute": "bfloat16"}, data={"packing": packing})
    config.model.architecture |= {"hidden_size": 64, "num_attention_heads": 4}  # a tiny copy of it can be made
    with mock.patch("lisa_dist.sharding.stay_whole", lambda *_: kind == "resident"):
        train_module = build_train_module(config)
    load_initial_weights(train_module, torch.device("cpu"))
    begin_period(train_module, 0)
    batches, asked = make_global_batches(1)[0][:2], []
    numbers = torch.Tensor.tolist

    def count(tensor: torch.Tensor) -> Any:
        asked.append(tensor)
        return numbers(tensor)

    with Looks() as looks, mock.patch.object(torch.Tensor, "tolist", count):
        loop.train_step(train_module, batches, 0, 2)
    return looks.made, len(asked)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", ["resident", "sharded"])
def test_in_a_step_the_host_asks_its_device_nothing(kind: str, packing: bool) -> None:
    looks, asked = run_on_ranks(1, looks_of_a_step, kind, packing)[0]
    assert not looks, looks[0]
    assert asked == 0


def events_of_a_run(config: Config) -> list[str]:
    """In which order steps are made and their numbers waited for, blocks drawn, and checkpoints saved."""
    events: list[str] = []
    train_step, draw, save = loop.train_step, loop.begin_period, CheckpointSaver.save

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        result = train_step(train_module, micro_batches, number, *rest, **more)
        events.append(f"made {number + 1}")
        read = result.measured.read

        def note() -> list[float]:
            if f"read {number + 1}" not in events:
                events.append(f"read {number + 1}")
            return read()

        result.measured.read = note
        return result

    def noted(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: (events.append(event), function(*arguments, **named))[1]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(loop, train_step=step, begin_period=noted("drawn", draw)))
        stack.enter_context(mock.patch.object(CheckpointSaver, "save", noted("saved", save)))
        train_here(config)
    return events


def test_a_step_is_waited_for_once_the_next_one_is_on_its_way_or_something_else_is_due(tmp_path: Path) -> None:
    config = make_config(tmp_path, "train.max_steps=7", "sampler.period=4", "checkpoint.every=6")
    expected = ["drawn", "made 1", "read 1", "made 2", "made 3", "read 2", "made 4", "read 3", "read 4"]
    expected += ["drawn", "made 5", "made 6", "read 5", "read 6", "saved", "made 7", "read 7", "saved"]
    assert run_on_ranks(1, events_of_a_run, config)[0] == expected
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]


def train_and_collect_titles(config: Config) -> list[str]:
    """Train and return the titles of the tables of answers. Runs on a rank."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert train_here(config) == 0
    return [line.strip() for line in output.getvalue().splitlines() if line.strip().startswith("answers ")]


def train_until_full(config: Config) -> str:
    """Train on a disk that is full from the row of step 2 on, nothing but the lock excepted; what is told."""
    write_row = loop.write_row

    def write_row_or_fill(run: Any, made: Any) -> None:
        if made.step == 2:
            writer = run.recorder.writer
            writer._files = {path: Path("/dev/full").open("a") for path in writer._files}  # noqa: SIM115
        write_row(run, made)

    full = mock.patch.object(recorder, "write_summary", side_effect=OSError(errno.ENOSPC, "full", "summary"))
    with full, mock.patch.object(loop, "write_row", write_row_or_fill), pytest.raises(StorageError) as told:
        loop.train(config)
    return str(told.value)


def test_a_disk_that_is_full_in_the_midst_ends_the_run_in_a_sentence_with_the_file(tmp_path: Path) -> None:
    (told,) = run_on_ranks(1, train_until_full, make_config(tmp_path, "checkpoint.every=0"))
    place = "in between steps of step 2)"
    assert (
        told
        == f"{tmp_path}/metrics.jsonl: No space left on device; free space there, or name a path with more ({place}"
    )


def test_sample_prompts_are_answered_in_between_and_change_nothing(tmp_path: Path) -> None:
    asked = ["train.sample_prompts=2", "train.sample_every=2"]
    (titles,) = run_on_ranks(1, train_and_collect_titles, make_config(tmp_path / "asked", *asked))
    between = ["answers after step 2", "answers after step 4"]
    assert titles == ["answers before training", *between, "answers after training"]
    assert run_on_ranks(1, train_and_collect_titles, make_config(tmp_path / "quiet")) == [[]]
    assert metrics(tmp_path / "asked") == metrics(tmp_path / "quiet")
    config = resuming(make_config(tmp_path / "asked", *asked))  # has nothing left to do
    assert run_on_ranks(1, train_and_collect_titles, config) == [["answers after training"]], "shown again"
    events = [row["text"] for row in read_rows(tmp_path / "asked" / "events.jsonl") if row["event"] == "answers"]
    assert events == titles, "and recorded once"
