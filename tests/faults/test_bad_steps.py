"""Steps whose loss or gradient is not finite, and losses that leap up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config, TrainConfig
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed
from lisa_dist.telemetry.history import read_rows, read_summary
from lisa_dist.training import loop
from lisa_dist.training import step as step_parts
from lisa_dist.training.recovery import LossSpikeError, NonFiniteError, is_spike
from tests.support import runs
from tests.support.ranks import run_on_ranks
from tests.support.runs import (
    assert_same_run,
    cut_back,
    final_state,
    final_tensors,
    metrics,
    resuming,
    tensors_of,
    train_here,
)

STEPS = 9


def make_config(run_dir: Path, *overrides: str) -> Config:
    """A run of nine steps, long enough for a spike and what follows."""
    return runs.make_config(run_dir, f"train.max_steps={STEPS}", "sampler.period=3", *overrides)


def train_with_bad_batches(config: Config, kind: str, bad: list[int]) -> Any:
    """Train where the loss or gradient of some global batches is bad on the last rank; the error where one ends it.

    Args:
        kind: ``gradient`` (one element is inf), ``loss`` (nan) or ``spike`` (the loss is ten times what it is).
        bad: the batches, by the order in which they are met first, from 1.
    """
    accumulate = step_parts.accumulate_gradients
    ordinary = loop.train_step
    seen: dict[int, int] = {}  # hash of a batch -> its number

    def step(train_module: Any, micro_batches: Any, number: int, *rest: Any, **more: Any) -> Any:
        key = hash(tuple(token for batch in micro_batches for token in batch["input_ids"].flatten().tolist()))
        seen.setdefault(key, len(seen) + 1)
        current[0] = seen[key]
        return ordinary(train_module, micro_batches, number, *rest, **more)

    def gradients(train_module: Any, micro_batches: Any, *rest: Any) -> tuple[torch.Tensor, float]:
        loss, tokens = accumulate(train_module, micro_batches, *rest)
        if current[0] in bad and distributed.rank() == distributed.world_size() - 1:
            if kind == "gradient":
                gradient = next(iter(train_module.optimizer.parameters.values())).grad
                distributed.local_shard(gradient).view(-1)[0] = math.inf
            loss = {"gradient": loss, "loss": math.nan * loss, "spike": 10 * loss + 100 * tokens}[kind]
        return loss, tokens

    current = [0]
    patched = mock.patch.object(step_parts, "accumulate_gradients", gradients)
    with patched, mock.patch.object(loop, "train_step", step):
        try:
            return train_here(config)
        except (NonFiniteError, LossSpikeError) as error:
            return str(error)


def happened(run_dir: Path) -> list[tuple[str, int]]:
    """What events.jsonl says, for the report's axis."""
    return [(row["event"], row["step"]) for row in read_rows(RunDirectory(run_dir).events)]


@pytest.mark.parametrize("kind", ["gradient", pytest.param("loss", marks=pytest.mark.soak)])
def test_bad_steps_are_left_out_and_kept(kind: str, tmp_path: Path) -> None:
    config = runs.make_config(tmp_path, "train.on_nonfinite=skip")
    assert run_on_ranks(2, train_with_bad_batches, config, kind, [3, 5]) == [0, 0]
    rows = [row for row in metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, runs.STEPS + 1))
    measured = "grad_norm" if kind == "gradient" else "loss"
    assert [row["step"] for row in rows if row[measured] is None] == [3, 5]
    assert all(row["loss"] is not None for row in rows if row["step"] not in (3, 5)), "the parameters stayed finite"
    assert read_summary(RunDirectory(tmp_path))["skipped_steps"] == 2
    assert final_state(tmp_path)["progress"]["skipped_steps"] == 2
    assert happened(tmp_path) == [("fault", 3), ("fault", 5)]
    folder = tmp_path / "faults" / "step_00000003"
    facts = json.loads((folder / "step.json").read_text())
    assert facts["step"] == 3 and len(facts["sequences"]) == 4
    kept = [load_file(folder / f"rank_0000{rank}.safetensors") for rank in range(2)]
    labelled = sum(int((t[:, 1:] != -100).sum()) for part in kept for name, t in part.items() if "labels" in name)
    assert labelled == rows[2]["label_tokens"]


def test_steps_left_out_before_a_resume_stay_in_the_summary(tmp_path: Path) -> None:
    half = runs.make_config(tmp_path, "train.on_nonfinite=skip", "train.max_steps=2")
    whole = runs.make_config(tmp_path, "train.on_nonfinite=skip", "checkpoint.resume=auto")
    assert run_on_ranks(1, train_with_bad_batches, half, "loss", [1]) == [0]
    assert run_on_ranks(1, train_with_bad_batches, whole, "loss", []) == [0]
    assert read_summary(RunDirectory(tmp_path))["skipped_steps"] == 1


def test_a_left_out_step_changes_nothing(tmp_path: Path) -> None:
    """The parameters after a left-out step are those before: the next loss of the same batch is the same."""
    config = make_config(tmp_path / "a", "train.on_nonfinite=skip", "train.max_steps=2", "scheduler.name=constant")
    assert run_on_ranks(2, train_with_bad_batches, config, "gradient", [2]) == [0, 0]
    after = final_tensors(tmp_path / "a")
    before = tensors_of(tmp_path / "a" / "checkpoints" / "step_00000001")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_stop_and_the_limit_name_the_step(tmp_path: Path) -> None:
    unrecorded = ("train.log_every=100", "checkpoint.every=0")
    for message in run_on_ranks(2, train_with_bad_batches, make_config(tmp_path / "a", *unrecorded), "gradient", [4]):
        assert message.startswith("step 4: loss ") and "faults/step_00000004" in message
    assert [row["step"] for row in metrics(tmp_path / "a") if "loss" in row] == [4], "no other step has a row"
    assert read_summary(RunDirectory(tmp_path / "a"))["exit_reason"].startswith("failed: NonFiniteError: step 4")
    config = make_config(tmp_path / "b", "train.on_nonfinite=skip", "train.nonfinite_limit=1")
    for message in run_on_ranks(2, train_with_bad_batches, config, "loss", [2, 5]):
        assert message.startswith("step 5: loss nan") and "1 steps were left out before" in message


SPIKES = ("train.spike_factor=3", "train.spike_window=3", "checkpoint.every=3")


def test_a_spike_takes_the_run_back_without_its_batch(tmp_path: Path) -> None:
    """Over a switch, whose blocks leave no moments in host memory when the run goes back to where they were frozen."""
    choices = (*SPIKES, "optimizer.state_on_freeze=offload", "checkpoint.keep=0")
    whole, killed = (make_config(tmp_path / name, *choices) for name in ("whole", "killed"))
    assert run_on_ranks(2, train_with_bad_batches, whole, "spike", [5]) == [0, 0]
    state = final_state(tmp_path / "whole")
    assert state["progress"]["left_out"] == [[16, 20]], "of 4 sequences a step, those of step 5"
    rows = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "rows past the checkpoint are cut"
    assert max(row["loss"] for row in rows) < 10
    timed = [row for row in read_rows(RunDirectory(tmp_path / "whole").metrics) if "loss" in row]
    assert all(sum(row["part_seconds"].values()) <= row["step_seconds"] for row in timed), "no seconds of dropped steps"
    # The same with a kill after the roll-back: what is skipped survives.
    cut_back(tmp_path / "whole", tmp_path / "killed", 6)
    assert run_on_ranks(2, train_with_bad_batches, resuming(killed), "spike", [-1]) == [0, 0]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert happened(tmp_path / "whole") == [("roll-back", 3)]
    assert happened(tmp_path / "killed") == [("roll-back", 3), ("resume", 6)]


def test_spikes_end_a_run_at_their_limit(tmp_path: Path) -> None:
    config = make_config(tmp_path, *SPIKES, "train.spike_limit=0", "train.log_every=100")
    for message in run_on_ranks(2, train_with_bad_batches, config, "spike", [6]):
        assert message.startswith("step 6: loss ") and "train.spike_limit" in message


def test_what_a_spike_is() -> None:
    config = TrainConfig(spike_factor=2.0, spike_window=3)
    assert not is_spike(config, [1.0, 1.0], 9.0), "too few losses to judge by"
    assert is_spike(config, [1.0, 1.2, 5.0], 2.5) and not is_spike(config, [1.0, 1.2, 5.0], 2.4)
    assert not is_spike(config, [1.0] * 3, math.nan) and not is_spike(config, [1.0] * 3, math.inf)
    assert not is_spike(TrainConfig(spike_window=1), [1.0], 9.0), "off"


def test_stretches_left_out() -> None:
    progress = Progress(left_out=[[10, 12], [4, 8]])
    assert [progress.place_of(number) for number in range(8)] == [0, 1, 2, 3, 8, 9, 12, 13]
    progress.left_out.append([9, 14])  # a batch that went over a stretch that was left out before
    assert [progress.place_of(number) for number in range(3, 7)] == [3, 8, 14, 15]
