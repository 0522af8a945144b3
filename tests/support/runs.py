"""Small runs of the real trainer for tests of checkpoints: trained on the ranks of a pool, cut short at will."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lisa_dist.checkpoint.manifest import checkpoint_name, list_checkpoints
from lisa_dist.checkpoint.shards import Piece, ShardedTensors, WrittenFile, write_pieces
from lisa_dist.checkpoint.state import open_weights
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.telemetry.records import read_rows, read_summary
from lisa_dist.training import loop
from lisa_dist.training import step as step_parts
from tests.support.ranks import run_on_ranks

STEPS, PERIOD = 6, 2
# No size is divisible by two ranks; dropout, so that a wrong random state shows.
ARCHITECTURE = (
    "{model_type:llama,vocab_size:1024,hidden_size:18,intermediate_size:27,num_hidden_layers:5,"
    "num_attention_heads:3,num_key_value_heads:1,max_position_embeddings:256,initializer_range:0.1,"
    "attention_dropout:DROPOUT}"
)


def make_config(run_dir: Path | str, *overrides: str, dropout: float = 0.1) -> Config:
    """A run of 6 steps in 3 periods with a checkpoint after every step; ``overrides`` as on the command line."""
    return load(
        [
            "model=custom",
            "model.init=random",
            "model.tokenizer=builtin:demo",
            f"model.architecture={ARCHITECTURE.replace('DROPOUT', str(dropout))}",
            "data=demo",
            "data.limit=60",
            "data.sequence_length=64",
            f"train.max_steps={STEPS}",
            "train.eval_batches=2",
            "train.global_batch_size=4",
            "train.micro_batch_size=1",
            "optimizer.lr=0.01",
            "scheduler.warmup_steps=2",
            f"sampler.period={PERIOD}",
            "sampler.active_layers=2",
            "parallel.cpu_threads=1",
            "checkpoint.every=1",
            "checkpoint.keep=2",
            f"run.dir={run_dir}",
            *overrides,
        ]
    )


class Killed(BaseException):
    """Ends a run at a point of the test's choice, as a kill would: nothing of the program catches it."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a run ends: ``before`` a step, ``inside`` its accumulation, or while its checkpoint is ``saved``."""

    where: str
    step: int  # counted from 1, as in the metrics


def step_written(file: Path) -> int:
    """The step of the checkpoint that a file is written for, before the checkpoint has its name."""
    return int(file.parent.parent.name.removeprefix(".step_").removesuffix(".partial"))


@contextmanager
def killed_at(kill: Kill | None) -> Iterator[None]:
    """Make the trainer of this process end at ``kill``."""
    if kill is None:
        yield
        return
    accumulate, begun = loop.train_step, step_parts.accumulate_gradients
    current = [0]

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        current[0] = number + 1
        if kill == Kill("before", number + 1):
            raise Killed
        return accumulate(train_module, micro_batches, number, *rest, **more)

    def gradients(train_module: Any, micro_batches: Any, *rest: Any) -> Any:
        if kill != Kill("inside", current[0]):
            return begun(train_module, micro_batches, *rest)
        begun(train_module, micro_batches[: len(micro_batches) // 2], *rest)
        raise Killed

    def writing(pieces: dict[str, Piece], file: Path) -> WrittenFile:
        if kill == Kill("saved", step_written(file)):
            raise Killed
        return write_pieces(pieces, file)

    with (
        mock.patch.object(loop, "train_step", step),
        mock.patch.object(step_parts, "accumulate_gradients", gradients),
        mock.patch("lisa_dist.checkpoint.protocol.write_pieces", writing),
    ):
        yield


def train_here(config: Config, kill: Kill | None = None) -> int | None:
    """Train in this rank; returns the exit code, or None where the run was cut short."""
    with killed_at(kill):
        try:
            return loop.train(config)
        except Killed:
            return None


def refusal(config: Config) -> str:
    """Return why training in this rank is refused."""
    with pytest.raises(UserError) as caught:
        train_here(config)
    return str(caught.value)


def train(world_size: int, config: Config, *kills: Kill) -> None:
    """Train to the end on a pool of ranks, cut short at each of ``kills`` in turn and resumed."""
    for kill in kills:
        assert set(run_on_ranks(world_size, train_here, config, kill)) == {None}, f"the run went past {kill}"
        config = resuming(config)
    assert set(run_on_ranks(world_size, train_here, config, None)) == {0}


def cut_back(run_dir: Path, copy: Path, step: int) -> None:
    """Copy a run without the checkpoints after ``step``, as if it was killed before the next, with more recorded."""
    shutil.copytree(run_dir, copy)
    for later in list_checkpoints(copy / "checkpoints"):
        if later.name > checkpoint_name(step):
            shutil.rmtree(later)


def resuming(config: Config) -> Config:
    """The same run, to be continued."""
    config = copy.deepcopy(config)
    config.checkpoint.resume = "auto"
    return config


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock or the memory decides."""
    varying = {"tokens_per_second", "label_tokens_per_second", "step_seconds", "data_seconds", "switch_seconds"}
    varying |= {"part_seconds", "peak_memory_gib", "mfu"}
    return [
        {key: value for key, value in row.items() if key not in varying} for row in read_rows(run_dir / "metrics.jsonl")
    ]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment of the newest checkpoint, whole."""
    return tensors_of(list_checkpoints(run_dir / "checkpoints")[0])


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment of a checkpoint, whole."""
    weights, moments = open_weights(checkpoint), ShardedTensors(checkpoint / "optimizer")
    found = {f"weights/{name}": weights.read(name).clone() for name in weights}
    return found | {f"optimizer/{name}": moments.read(name).clone() for name in moments}


def final_state(run_dir: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint, without the record of resumes and of where weights lie."""
    state = json.loads((list_checkpoints(run_dir / "checkpoints")[0] / "state.json").read_text())
    del state["progress"]["resumed_from"], state["external"], state["since_full"]
    return state


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Metrics, layers, final weights, moments and state are bit for bit those of ``reference``."""
    assert metrics(run_dir) == metrics(reference)
    assert read_rows(run_dir / "layers.jsonl") == read_rows(reference / "layers.jsonl")
    assert final_state(run_dir) == final_state(reference)
    for figure in ("exit_reason", "final_step", "final_loss", "best_eval_loss", "tokens_seen", "label_tokens_seen"):
        assert read_summary(RunDirectory(run_dir))[figure] == read_summary(RunDirectory(reference))[figure], figure
    found, expected = final_tensors(run_dir), final_tensors(reference)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def make_run(directory: Path, base: Path, *overrides: str) -> Config:
    """A run of two steps from a tiny model on disk."""
    return load(
        [
            f"model.path={base}",
            "model.tokenizer=builtin:demo",
            "data=demo",
            "data.limit=8",
            "train.max_steps=2",
            "train.global_batch_size=4",
            "precision.frozen=float32",
            "precision.compute=float32",
            "parallel.cpu_threads=1",
            "checkpoint.every=2",
            f"run.dir={directory}",
            *overrides,
        ]
    )
