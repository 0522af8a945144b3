"""A run that goes on with other settings or other data than its checkpoint's: what goes on, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lisa_dist.checkpoint.export import find_checkpoint
from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.config import Config, UserError
from lisa_dist.config.paths import MODELS
from lisa_dist.telemetry.records import read_rows
from lisa_dist.training import loop
from tests.support.ranks import run_on_ranks
from tests.support.runs import Kill, final_state, make_config, refusal, resuming, train_here

ROWS = 20
START = ["train.max_steps=2", "train.global_batch_size=4", "data.sequence_length=32", "sampler.period=2"]


def write_rows(path: Path, changes: dict[int, str] | None = None, order: list[int] | None = None) -> Path:
    """Rows of different questions and answers, in JSON lines or as one JSON list."""
    answers = {row: f"It is {row}." for row in range(ROWS)} | (changes or {})
    rows = [{"prompt": f"What is {row}?", "completion": answers[row]} for row in order or range(ROWS)]
    text = json.dumps(rows) if path.suffix == ".json" else "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_text(text)
    return path


def config_of(base: Path, *overrides: str) -> Config:
    """A run on the rows and the tokenizer in ``base``, in its directory ``run``."""
    inputs = ["data=custom", "data.limit=null", f"data.path={base / 'rows.jsonl'}"]
    inputs += [f"model.tokenizer={base / 'tokenizer'}", f"data.cache_dir={base / 'cache'}"]
    return make_config(base / "run", *inputs, *START, *overrides)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that made two steps of four sequences each, with its rows and its tokenizer beside it."""
    base = tmp_path_factory.mktemp("begun")
    write_rows(base / "rows.jsonl")
    shutil.copytree(MODELS / "demo", base / "tokenizer")
    assert run_on_ranks(1, train_here, config_of(base)) == [0]
    return base


@pytest.fixture
def base(begun: Path, tmp_path: Path) -> Path:
    """A copy of the begun run, rows and tokenizer moved with it."""
    shutil.copytree(begun, tmp_path / "moved")
    return tmp_path / "moved"


def train_and_tell(config: Config) -> list[set[tuple[int, ...]]]:
    """Train; the token sequences of each step, padding cut off, without their order. Runs on a rank."""
    ordinary, steps = loop.train_step, []

    def step(train_module: Any, micro_batches: Any, *rest: Any, **more: Any) -> Any:
        rows = [row for batch in micro_batches for row in batch["input_ids"].tolist()]
        steps.append({tuple(row[: len(row) - row[::-1].index(2)]) for row in rows})  # 2 ends a text
        return ordinary(train_module, micro_batches, *rest, **more)

    with mock.patch.object(loop, "train_step", step):
        assert train_here(config) == 0
    return steps


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def swap_tokens(base: Path) -> None:
    """Exchange the ids of two tokens that no row has."""

    def change(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(base / "tokenizer" / "tokenizer.json", change)


def change_template(base: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["chat_template"] += "{# another one #}"

    edit(base / "tokenizer" / "tokenizer_config.json", change)


OTHER_DATA: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "an edited row": (lambda base: write_rows(base / "rows.jsonl", {7: "It is 8."}), [], "the rows differ"),
    "another order": (lambda base: write_rows(base / "rows.jsonl", order=[1, 0, *range(2, ROWS)]), [], "rows differ"),
    "a row more": (lambda base: write_rows(base / "rows.jsonl", order=[*range(ROWS), 0]), [], "the rows differ"),
    "another limit": (lambda base: None, ["data.limit=19"], "data.limit=null then, 19 now)"),
    "rows held out": (lambda base: None, ["data.validation=0.1"], "data.validation=null then, 0.1 now)"),
    "other labels": (lambda base: None, ["data.train_on_prompt=true"], "data.train_on_prompt=false then, true now)"),
    "another length": (lambda base: None, ["data.sequence_length=40"], "data.sequence_length=32 then, 40 now;"),
    "packing": (lambda base: None, ["data.packing=true"], "other data: data.packing=false then, true now;"),
    "another tokenizer": (swap_tokens, [], "another tokenizer"),
    "another template": (change_template, [], "other data: another chat template"),
}


@pytest.mark.parametrize("kind", OTHER_DATA)
def test_other_data_are_refused_by_name_and_nothing_is_written_over(kind: str, base: Path) -> None:
    change, overrides, told = OTHER_DATA[kind]
    files = [path for path in (base / "run").rglob("*") if path.is_file() and "logs" not in path.parts]
    kept = {path: path.read_bytes() for path in files}
    change(base)
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, "train.max_steps=3", *overrides)))
    assert told in message and "was trained on other data" in message and "checkpoint.new_data=true" in message
    assert kept == {path: path.read_bytes() for path in kept}, "the run is as it was"


def test_the_same_rows_elsewhere_go_on_and_every_changed_setting_is_told(base: Path) -> None:
    (base / "rows.jsonl").unlink()
    elsewhere = write_rows(base / "the same.json")
    changes = ["optimizer.lr=0.5", "scheduler.name=linear", "train.seed=5", "train.max_steps=3"]
    config = config_of(base, *changes)
    config.data.path = str(elsewhere)
    assert run_on_ranks(1, train_here, resuming(config)) == [0]
    log = (base / "run" / "logs" / "rank_0.log").read_text()
    table = " ".join(log.split("the configuration differs from the checkpoint's")[1].split())
    for row in ("optimizer.lr │ 0.01 │ 0.5", "scheduler.name │ cosine │ linear", "train.max_steps │ 2 │ 3"):
        assert row in table
    assert "train.seed │ 0 │ 5" in table and "train.seed: the order of the data keeps the seed" in table
    assert "data.path" in table and "run.dir" not in table and "checkpoint.resume" not in table


def test_an_unchanged_run_tells_of_no_changes(base: Path) -> None:
    config = config_of(base)
    assert run_on_ranks(1, train_here, resuming(config)) == [0]
    assert "differs from the checkpoint's" in (base / "run" / "logs" / "rank_0.log").read_text(), "it was moved"
    assert run_on_ranks(1, train_here, resuming(config)) == [0]


@pytest.mark.parametrize(("packing", "epochs"), [("false", 1.4), ("true", 2)])
def test_another_global_batch_and_seed_go_on_at_the_next_sequence(
    packing: str, epochs: float, begun: Path, tmp_path: Path
) -> None:
    """No row is repeated or left out, and the order is that of the first seed; steps left follow from rows left."""
    for name in ("rows.jsonl", "tokenizer"):
        (tmp_path / name).symlink_to(begun / name)
    settings = [f"data.packing={packing}", "train.max_steps=null", f"train.epochs={epochs}", "data.sequence_length=20"]
    whole, cut = (config_of(tmp_path, *settings, "checkpoint.every=2") for _ in range(2))
    whole.run.dir = str(tmp_path / "whole")
    (expected,) = run_on_ranks(1, train_and_tell, whole)
    assert run_on_ranks(1, train_here, cut, Kill("before", 3)) == [None]
    cut.train.global_batch_size, cut.train.seed = 2, 9
    (found,) = run_on_ranks(1, train_and_tell, resuming(cut))
    pairs = [first | second for first, second in zip(found[::2], found[1::2], strict=True)]
    assert pairs == expected[2:]
    rows, of_whole = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    assert [row["epoch"] for row in rows[2:]][1::2] == [row["epoch"] for row in of_whole[2:]]
    assert [row["step"] for row in rows] == list(range(1, 3 + 2 * (len(expected) - 2)))


def test_new_data_begin_at_their_start_and_go_on_by_themselves(base: Path) -> None:
    new = write_rows(base / "new.jsonl", {row: f"Now it is {row}." for row in range(ROWS)})
    config = config_of(base, f"data.path={new}", "train.max_steps=4", "checkpoint.new_data=true")
    assert run_on_ranks(1, train_here, resuming(config), Kill("before", 4)) == [None]
    log = (base / "run" / "logs" / "rank_0.log").read_text()
    assert "checkpoint.new_data=true: other data than those of step_00000002 (rows)" in log
    assert final_state(base / "run")["progress"]["sequences"] == 4
    assert [row["epoch"] for row in read_rows(base / "run" / "metrics.jsonl")] == [0.2, 0.4, 0.2]
    assert run_on_ranks(1, train_here, resuming(config)) == [0]
    assert final_state(base / "run")["progress"]["sequences"] == 8, "the second time they are not new"
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, "train.max_steps=5")))
    assert "the rows differ" in message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["always_active.embeddings=false"], "was written with always_active.embeddings=True, this run has"),
        (["update=low_rank", "update.rank=4"], "was written with update.name=full_rank, this run has update.name=low"),
        (["model.architecture.rms_norm_eps=0.1"], "the one that the run began with: rms_norm_eps=1e-06 then, 0.1 now;"),
    ],
)
def test_another_method_is_refused(overrides: list[str], told: str, base: Path) -> None:
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, *overrides)))
    assert told in message


def test_another_scaling_of_adapters_is_refused(base: Path) -> None:
    """The weights of the checkpoint would be another model's, and exports of it merged otherwise than trained."""
    shutil.rmtree(base / "run")
    adapted = ["method=lora", "update.rank=4", "train.max_steps=1"]
    assert run_on_ranks(1, train_here, config_of(base, *adapted)) == [0]
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, *adapted, "update.alpha=64")))
    assert "was written with update.alpha=32.0, this run has update.alpha=64.0" in message
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, *adapted, "update.rslora=true")))
    assert "was written with update.rslora=False" in message


def test_another_rank_of_the_projection_is_refused(base: Path) -> None:
    shutil.rmtree(base / "run")
    projected = ["update=low_rank", "train.max_steps=1"]
    assert run_on_ranks(1, train_here, config_of(base, *projected, "update.rank=4")) == [0]
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, *projected, "update.rank=3")))
    assert "holds optimizer state of other tensors than this run's (update.rank=4 then, 3 now)" in message


def test_a_start_that_was_refused_leaves_no_settings_to_go_on_with(base: Path) -> None:
    config = config_of(base, "train.global_batch_size=3", "train.micro_batch_size=2")
    config.run.dir = str(base / "refused")
    (message,) = run_on_ranks(1, refusal, config)
    assert "train.global_batch_size=3" in message
    assert not (base / "refused" / "config.yaml").exists()
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, "data.packing=true")))
    assert (base / "run" / "config.yaml").exists(), "that of a run stays"


@pytest.mark.parametrize("number", [None, 99])
def test_a_checkpoint_of_another_format_is_refused(number: int | None, base: Path) -> None:
    checkpoints = base / "run" / "checkpoints"
    newest = list_checkpoints(checkpoints)[0]
    edit(newest / "manifest.json", lambda content: content.pop("format"))
    if number is not None:
        edit(newest / "manifest.json", lambda content: content.update(format=number))
    (message,) = run_on_ranks(1, refusal, resuming(config_of(base, "train.max_steps=3")))
    assert message.startswith(f"{newest}: is a checkpoint of format {number or 1}, this version of lisa_dist reads ")
    with pytest.raises(UserError, match="is a checkpoint of format"):
        find_checkpoint(checkpoints, None)
