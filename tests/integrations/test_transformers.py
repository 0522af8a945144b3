"""The callback in real trainers: Hugging Face's, TRL's, and a loop under FSDP2 as accelerate sets it up."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lisa_dist.config import AlwaysActiveConfig, SamplerConfig, UserError
from lisa_dist.config.sampling import (
    BanditSamplerConfig,
    OutlierSamplerConfig,
    SweepSamplerConfig,
    UniformSamplerConfig,
)
from lisa_dist.integrations.transformers import RECORD, LisaCallback
from lisa_dist.method.sampling import build_sampler
from lisa_dist.runtime import distributed
from tests.support.families import tiny_config
from tests.support.ranks import run_on_ranks

BLOCKS, PERIOD = 4, 2


def make_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=BLOCKS))


def make_data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 120, (9,), generator=generator) for _ in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


def make_arguments(directory: Path, steps: int, save_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=steps,
        save_steps=save_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


class Watcher(TrainerCallback):
    """Notes after each step what trains and what the optimizer holds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        held = [tensor for entry in optimizer.state.values() for tensor in entry.values() if torch.is_tensor(tensor)]
        self.rows.append(
            {
                "trained": {name for name, parameter in model.named_parameters() if parameter.requires_grad},
                "with_state": {name for name, parameter in model.named_parameters() if parameter in optimizer.state},
                "bytes": sum(tensor.nbytes for tensor in held),
                "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
            }
        )


def draws(config: SamplerConfig, periods: int) -> list[list[int]]:
    sampler = build_sampler(config, BLOCKS)
    return [sampler.draw(period) for period in range(periods)]


def expected_names(model: Any, blocks: list[int]) -> set[str]:
    names = {name for name, _ in model.named_parameters()}
    return {name for name in names if ".layers." not in name or int(name.split(".")[2]) in blocks}


def test_state_stays_flat_and_only_active_blocks_move_over_twenty_periods(tmp_path: Path) -> None:
    config = UniformSamplerConfig(active_layers=2, period=PERIOD, seed=5)
    model, watcher = make_model(), Watcher()
    arguments = make_arguments(tmp_path, steps=20 * PERIOD, save_steps=1000)
    trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), callbacks=[LisaCallback(config), watcher])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    drawn = draws(config, 20)
    assert len({tuple(blocks) for blocks in drawn}) > 3
    for step, row in enumerate(watcher.rows):
        names = expected_names(model, drawn[step // PERIOD])
        assert row["trained"] == row["with_state"] == names
        moved = {name for name in before if not torch.equal(row["weights"][name], before[name])}
        assert moved == names
        before = row["weights"]
    assert len({row["bytes"] for row in watcher.rows}) == 1
    assert [row[RECORD] for row in trainer.state.log_history if RECORD in row] == drawn


def test_what_was_frozen_before_training_stays_so_and_is_not_in_the_norm_that_clips(tmp_path: Path) -> None:
    model, watcher = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), Watcher()
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    callback = LisaCallback(UniformSamplerConfig(active_layers=2, period=PERIOD, seed=5))
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    arguments = make_arguments(tmp_path, steps=2 * PERIOD, save_steps=1000)
    arguments.max_grad_norm = 1e-3  # so small that each gradient is cut to it
    trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), callbacks=[callback, watcher, Norms()])
    trainer.train()
    for step, row in enumerate(watcher.rows):
        active = draws(callback.config, 2)[step // PERIOD]
        assert row["trained"] == {name for name in adapters if int(name.partition(".layers.")[2][0]) in active}
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2), "the clipped norm is that of what trains"


def test_resume_in_the_middle_of_a_period_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    config = SweepSamplerConfig(active_layers=1, period=3, order="random", seed=2)
    finals, sets = [], []
    for directory, stop in ((tmp_path / "whole", None), (tmp_path / "cut", 5)):
        watcher = Watcher()
        for steps in [8] if stop is None else [stop, 8]:
            trainer = Trainer(
                model=make_model(),
                args=make_arguments(directory, steps=steps, save_steps=5),
                train_dataset=make_data(),
                callbacks=[LisaCallback(config), watcher],
            )
            trainer.train(resume_from_checkpoint=steps == 8 and stop is not None)
        finals.append({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
        sets.append([row["trained"] for row in watcher.rows])
    assert sets[0] == sets[1] and sets[0][2] != sets[0][3] and sets[0][5] != sets[0][6]
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_what_is_switched_off_never_trains(tmp_path: Path) -> None:
    watcher = Watcher()
    callback = LisaCallback(
        SweepSamplerConfig(active_layers=1, period=1), AlwaysActiveConfig(embeddings=False, norm=True, head=False)
    )
    arguments = make_arguments(tmp_path, steps=2, save_steps=1000)
    Trainer(model=make_model(), args=arguments, train_dataset=make_data(), callbacks=[callback, watcher]).train()
    outside = [{name for name in row["trained"] if ".layers." not in name} for row in watcher.rows]
    assert outside == [{"model.norm.weight"}] * 2


def test_a_second_trainer_of_the_model_finds_nothing_frozen(tmp_path: Path) -> None:
    model, watcher = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])), Watcher()
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    callbacks = [LisaCallback(UniformSamplerConfig(active_layers=1)), watcher]
    arguments = make_arguments(tmp_path, steps=1, save_steps=1000)
    Trainer(model=model, args=arguments, train_dataset=make_data(), callbacks=callbacks).train()
    assert watcher.rows[0]["trained"] < before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


class BreakOff(TrainerCallback):
    """Ends a training as Ctrl-C does."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_trainer_after_one_that_was_broken_off_trains_every_block(tmp_path: Path) -> None:
    model, arguments = make_model(), make_arguments(tmp_path, steps=1, save_steps=1000)
    for others in ([BreakOff()], []):
        callbacks = [LisaCallback(UniformSamplerConfig(active_layers=1)), *others]
        trainer = Trainer(model=model, args=arguments, train_dataset=make_data(), callbacks=callbacks)
        assert all(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(KeyboardInterrupt) if others else nullcontext():
            trainer.train()


def test_a_callback_that_comes_too_late_to_thaw_is_refused(tmp_path: Path) -> None:
    model, arguments = make_model(), make_arguments(tmp_path, steps=1, save_steps=1000)
    callbacks = [LisaCallback(UniformSamplerConfig(active_layers=1)), BreakOff()]
    broken_off = Trainer(model=model, args=arguments, train_dataset=make_data(), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        broken_off.train()
    trainer = Trainer(model=model, args=arguments, train_dataset=make_data())
    trainer.add_callback(LisaCallback(UniformSamplerConfig(active_layers=1)))
    with pytest.raises(UserError, match=r"^add_callback: a training of this model that was broken off left blocks fro"):
        trainer.train()
    broken_off.remove_callback(callbacks[1])
    broken_off.train()  # whose optimizer has them all


def test_a_resume_with_another_period_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, period, told in ((3, 2, False), (4, 2, False), (5, 3, True)):
        callbacks = [LisaCallback(UniformSamplerConfig(active_layers=1, period=period))]
        arguments = make_arguments(tmp_path, steps=steps, save_steps=steps)
        trainer = Trainer(model=make_model(), args=arguments, train_dataset=make_data(), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=steps > 3)
        assert ("resumed with another sampler, period or seed: period 1 began at step 2" in caplog.text) == told


def test_blocks_that_are_not_drawn_are_told(caplog: pytest.LogCaptureFixture) -> None:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    model = T5ForConditionalGeneration(T5Config(**shape))
    callback, arguments = LisaCallback(), SimpleNamespace(ddp_find_unused_parameters=None, seed=0)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    assert [record.args for record in caplog.records] == [("encoder.block", "decoder.block")]
    model.encoder.requires_grad_(False)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=make_model())
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (OutlierSamplerConfig(), "sampler=outlier: needs calibration data"),
        (BanditSamplerConfig(), "sampler=bandit: learns from the gradients of every step"),
    ],
)
def test_samplers_that_need_more_than_a_callback_has_are_refused(
    sampler: SamplerConfig, reason: str, tmp_path: Path
) -> None:
    trainer = Trainer(
        model=make_model(),
        args=make_arguments(tmp_path, steps=1, save_steps=1000),
        train_dataset=make_data(),
        callbacks=[LisaCallback(sampler)],
    )
    with pytest.raises(UserError, match=reason):
        trainer.train()


def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from lisa_dist.data.tokenizer import load_tokenizer

    rows = [{"prompt": f"number {index}: ", "completion": str(index)} for index in range(16)]
    config = UniformSamplerConfig(active_layers=1, period=PERIOD, seed=5)
    watcher = Watcher()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config("llama", vocab_size=1024, num_hidden_layers=BLOCKS, bos_token_id=1, eos_token_id=2)
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=load_tokenizer("builtin:demo"),
        callbacks=[LisaCallback(config), watcher],
    )
    trainer.train()
    names = [expected_names(model, blocks) for blocks in draws(config, 3)]
    assert [row["trained"] for row in watcher.rows] == [name for name in names for _ in range(PERIOD)]
    assert all(row["with_state"] == row["trained"] for row in watcher.rows)


def drive(shard: bool) -> dict[str, Any]:
    """Three periods of a plain loop with the callback's events; under FSDP2 each rank has half of each batch."""
    model = make_model()
    if shard:
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    callback = LisaCallback(UniformSamplerConfig(active_layers=1, period=PERIOD, seed=5))
    state, control = TrainerState(), TrainerControl()
    arguments: Any = SimpleNamespace(ddp_find_unused_parameters=False, seed=0)
    kwargs = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(arguments, state, control, **kwargs)
    rows = torch.stack([row["input_ids"] for row in make_data()])
    flat, dtypes = [], set()
    for step in range(3 * PERIOD):
        state.global_step = step
        callback.on_step_begin(arguments, state, control, **kwargs)
        batch = rows[2 * step : 2 * step + 2]
        mine = batch[distributed.rank() :: distributed.world_size()] if shard else batch
        model(input_ids=mine, labels=mine).loss.backward()
        dtypes |= {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        flat.append(len(optimizer.state))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in values.items()}
    return {"weights": whole, "flat": flat, "blocks": [row[RECORD] for row in state.log_history], "dtypes": dtypes}


def test_sharded_by_fsdp2_it_equals_one_device() -> None:
    sharded, alone = run_on_ranks(2, drive, True), run_on_ranks(1, drive, False)[0]
    for result in sharded:
        assert result["blocks"] == alone["blocks"] and len({tuple(blocks) for blocks in alone["blocks"]}) > 1
        assert set(result["flat"]) == set(alone["flat"]) and len(set(alone["flat"])) == 1
        assert result["dtypes"] == {torch.float32}
        for name, value in alone["weights"].items():
            assert (result["weights"][name] - value).norm() < 1e-4 * value.norm() + 1e-6, name


def refused_without_unused_parameters() -> str:
    """Runs on every rank."""
    arguments: Any = SimpleNamespace(ddp_find_unused_parameters=None, seed=0)
    try:
        LisaCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=make_model())
    except UserError as error:
        return str(error)
    return "no error"


def test_data_parallelism_must_allow_frozen_blocks() -> None:
    said = run_on_ranks(2, refused_without_unused_parameters)
    assert all("ddp_find_unused_parameters=None: must be True" in text for text in said)
