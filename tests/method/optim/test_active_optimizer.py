"""State that waits in host memory while a block is frozen, and steps within the backward pass, on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lisa_dist.checkpoint.manifest import list_checkpoints
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.config import Config, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations
from lisa_dist.method.module import begin_period, build_train_module, count_persistent_bytes
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support import runs
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, full_parameters, make_config, make_global_batches


def states_over_periods() -> dict[str, Any]:
    """The state of a block before its freeze, while frozen and after its return. Runs on every rank."""
    config = make_config(optimizer={"state_on_freeze": "offload"}, sampler={"active_layers": 1, "seed": 1})
    config.model.architecture["num_hidden_layers"] = 3
    train_module = build_and_load(config)
    batches = make_global_batches(2)
    seen: list[dict[str, Any]] = []
    for period in range(5):
        begin_period(train_module, period)
        begun = {name: tensor.to_local().clone() for name, tensor in train_module.optimizer.moment_tensors().items()}
        counts = train_module.optimizer.step_counts()
        for step, micro_batches in enumerate(batches):
            train_step(
                train_module, micro_batches[distributed.rank() :: distributed.world_size()], 2 * period + step, 10
            )
        ended = {name: tensor.to_local().clone() for name, tensor in train_module.optimizer.moment_tensors().items()}
        entry = {"block": train_module.active.blocks[0], "begun": begun, "counts": counts, "ended": ended}
        seen.append(
            entry | {"bytes": count_persistent_bytes(train_module), "waiting": len(train_module.optimizer.offloaded)}
        )
    return {"periods": seen}


def copies_after_a_step(writes: bool) -> tuple[int, int]:
    """How many parameters have a copy apart, and how many of these hold what the optimizer wrote. Runs on a rank."""
    train_module = build_and_load(make_config(precision={"frozen": "bfloat16", "compute": "bfloat16"}))
    begin_period(train_module, 0)
    stepper: Any = train_module.optimizer._stepper
    masters = {name: train_module.store.master(name) for name in train_module.optimizer.parameters}
    apart: dict[str, Any] = {name: master for name, master in masters.items() if hasattr(master, "compute_copy")}
    step = stepper.step

    def step_and_mark() -> None:
        step()
        for master in apart.values():
            master.compute_copy.fill_(7.0)
        stepper.copied = list(apart.values()) if writes else []

    stepper.step = step_and_mark
    train_step(train_module, make_global_batches(1)[0], 0, 10)
    return len(apart), sum(bool((train_module.store.parameter(name) == 7).all()) for name in apart)


@pytest.mark.parametrize("writes", [False, True])
def test_a_copy_that_the_optimizer_writes_is_not_written_again(writes: bool) -> None:
    ((apart, kept),) = run_on_ranks(1, copies_after_a_step, writes)
    assert apart > 10 and kept == (apart if writes else 0)


def test_offloaded_state_returns_bit_for_bit_and_is_counted() -> None:
    for rank in run_on_ranks(2, states_over_periods):
        periods, returned = rank["periods"], 0
        for index, now in enumerate(periods):
            earlier = [other for other in periods[:index] if other["block"] == now["block"]]
            names = [name for name in now["begun"] if f".layers.{now['block']}." in name]
            assert names
            for name in names:
                if not earlier:
                    assert not now["begun"][name].any()
                else:
                    returned += 1
                    assert torch.equal(now["begun"][name], earlier[-1]["ended"][name]) and now["begun"][name].any()
            count = next(count for name, count in now["counts"].items() if f".layers.{now['block']}." in name)
            assert count == 2 * len(earlier)
            # Only the active block's state is counted as the optimizer's; the rest waits, one block's worth for each.
            others = {other["block"] for other in periods[: index + 1]} - {now["block"]}
            of_block = sum(now["ended"][name].nbytes for name in names)
            assert now["bytes"].get("offloaded_optimizer_state", 0) == pytest.approx(len(others) * of_block, rel=0.05)
        assert returned > 0, "a seed that draws a block twice is needed for this test"


def train_in_backward(in_backward: bool, parallel: dict[str, Any]) -> dict[str, Any]:
    """Two periods of one sequence a rank, unclipped. Runs on every rank."""
    config = make_config(optimizer={"in_backward": in_backward, "grad_clip": 0.0}, parallel=parallel)
    train_module = build_and_load(config)
    results = []
    for step, micro_batches in enumerate(make_global_batches(4)):
        if step % 2 == 0:
            begin_period(train_module, step // 2)
        results.append(train_step(train_module, [micro_batches[distributed.rank()]], step, 4))
    assert all(parameter.grad is None for parameter in train_module.optimizer.parameters.values())
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return {"losses": losses, "norms": norms, "final": full_parameters(train_module)}


@pytest.mark.parametrize("parallel", [{}, {"replicate": 2}], ids=["two shards", "two replicas"])
def test_steps_within_the_backward_pass_equal_the_usual_ones(parallel: dict[str, Any]) -> None:
    plain = run_on_ranks(2, train_in_backward, False, parallel)[0]
    at_once = run_on_ranks(2, train_in_backward, True, parallel)[0]
    assert at_once["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert at_once["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    for name, parameter in at_once["final"].items():
        assert torch.allclose(parameter, plain["final"][name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"global_batch_size": 2}}, "train.global_batch_size=2 must be micro-batch x ranks, 1"),
        ({"train": {"global_batch_size": 1, "on_nonfinite": "skip"}}, "train.on_nonfinite must be stop"),
    ],
)
def test_what_a_step_in_backward_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    config = make_config(optimizer={"in_backward": True}, **changes)
    with pytest.raises(UserError, match=message):
        check_combinations(config)
        check_accumulation(config, ranks=1)


def waiting(config: Config, checkpoint: Path) -> int:
    """How many parameters have state in host memory after a checkpoint is read. Runs on every rank."""
    train_module = build_train_module(config)
    restore_checkpoint(train_module, checkpoint, torch.device("cpu"), data={})
    return len(train_module.optimizer.offloaded)


def test_state_that_waits_is_in_the_checkpoint(tmp_path: Path) -> None:
    overrides = ["optimizer.state_on_freeze=offload", "train.eval_batches=1", "checkpoint.keep=3"]
    runs.train(2, runs.make_config(tmp_path / "whole", *overrides))
    runs.cut_back(tmp_path / "whole", tmp_path / "cut", runs.STEPS - 2)
    runs.train(2, runs.resuming(runs.make_config(tmp_path / "cut", *overrides)))
    runs.assert_same_run(tmp_path / "cut", tmp_path / "whole")
    newest = list_checkpoints(tmp_path / "cut" / "checkpoints")[0]
    assert min(run_on_ranks(2, waiting, runs.make_config(tmp_path / "kept", *overrides), newest)) > 0
    assert run_on_ranks(2, waiting, runs.make_config(tmp_path / "dropped"), newest) == [0, 0], "as discard says"
