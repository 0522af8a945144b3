"""Pairs of options that exclude each other, and options that have no effect with the others: refused, or said."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from lisa_dist.cli import main
from lisa_dist.config import UserError
from lisa_dist.config.checks import check_accumulation, check_combinations, check_global_batch, check_streamed
from lisa_dist.config.commands import GenerateConfig
from lisa_dist.config.gpu import read_gpu
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.loading import conf_dir, load
from lisa_dist.config.optimization import OPTIMIZER_CONFIGS, SchedulerConfig, TrainConfig
from lisa_dist.config.placement import ParallelConfig
from lisa_dist.config.sampling import SAMPLER_CONFIGS, ProbeRequest, SamplerConfig
from lisa_dist.config.updates import UPDATE_CONFIGS, UpdateConfig

MODEL = ["model.path=a/model", "data.path=rows.json"]

# what is chosen -> the key that has no effect then, and what must be chosen besides for it to have one
WITHOUT_EFFECT = [
    (["sampler=all"], "sampler.active_layers=2, sampler.period=20, sampler.seed=null", ["sampler=uniform"]),
    (["sampler=sweep", "sampler.seed=3"], "sampler.seed=3", ["sampler.order=random"]),
    (["sampler=bandit", "sampler.eta=0", "sampler.smoothing=0.5"], "sampler.smoothing=0.5", ["sampler.eta=1"]),
    (["optimizer.in_backward=true"], "optimizer.grad_clip=1.0", ["optimizer.in_backward=false"]),
    (["optimizer.decay_norms_and_biases=true"], "optimizer.decay_norms_and_biases", ["optimizer.weight_decay=0.1"]),
    (["method=full", "optimizer.state_on_freeze=offload"], "optimizer.state_on_freeze=offload", ["sampler=uniform"]),
    (["scheduler=constant", "scheduler.min_lr_ratio=0.1"], "scheduler.min_lr_ratio=0.1", ["scheduler=linear"]),
    (["train.max_steps=5", "train.epochs=2"], "train.epochs=2.0", ["train.max_steps=null"]),
    (["train.nonfinite_limit=3"], "train.nonfinite_limit=3", ["train.on_nonfinite=skip"]),
    (["train.spike_window=9"], "train.spike_window=9", ["train.spike_factor=2"]),
    (["train.spike_limit=9"], "train.spike_limit=9", ["train.spike_factor=2"]),
    (["method=full", "parallel.offload=frozen"], "parallel.offload=frozen", ["method=lora"]),
    (["parallel.memory_limit=20"], "parallel.memory_limit=20.0", ["parallel.activation_checkpointing=auto"]),
    (["parallel.defer_reduction=true"], "parallel.defer_reduction=true", ["train.global_batch_size=16"]),
    (
        ["parallel.block_major=true", "parallel.offload=frozen", "train.global_batch_size=8"],
        "parallel.block_major=true",
        ["train.global_batch_size=16"],
    ),
    (
        [
            *["parallel.block_major=true", "parallel.offload=frozen", "train.global_batch_size=16"],
            "parallel.activation_checkpointing=full",
        ],
        "parallel.activation_checkpointing=full",
        ["parallel.block_major=false"],
    ),
    (
        [
            *["parallel.block_major=true", "parallel.offload=frozen", "train.global_batch_size=8"],
            "parallel.offload_activations=true",
        ],
        "parallel.offload_activations=true",
        ["train.global_batch_size=16"],
    ),
    (
        ["parallel.replicate=8", "parallel.defer_reduction=true", "train.global_batch_size=16"],
        "parallel.defer_reduction=true",
        ["parallel.replicate=4"],
    ),
    (
        ["parallel.replicate=8", "parallel.reshard_after_forward=false"],
        "parallel.reshard_after_forward=false",
        ["parallel.offload=frozen"],
    ),
    (["parallel.replicate=8", "parallel.prefetch=2"], "parallel.prefetch=2", ["parallel.replicate=4"]),
    (["parallel.optimizer_shard=world"], "parallel.optimizer_shard=world", ["parallel.replicate=2"]),
    (["method=full", "precision.frozen=float32"], "precision.frozen=float32", ["method=lora"]),
    (["parallel.shard=1", "precision.reduce=bfloat16"], "precision.reduce=bfloat16", ["parallel.replicate=8"]),
    (["method=ist", "precision.on_freeze=nearest"], "precision.on_freeze=nearest", ["update=full_rank"]),
    (["method=full", "precision.on_freeze=nearest"], "precision.on_freeze=nearest", ["sampler=uniform"]),
    (
        ["precision.frozen=float32", "precision.on_freeze=nearest"],
        "precision.on_freeze=nearest",
        ["precision.frozen=bfloat16"],
    ),
    (["data.group_by_length=true", "data.packing=true"], "data.group_by_length=true", ["data.packing=false"]),
    (["model.attention=varlen"], "model.attention=varlen", ["data.packing=true"]),
    (["checkpoint.full_every=4"], "checkpoint.full_every=4", ["checkpoint.every=10"]),
    (["checkpoint.async=true"], "checkpoint.async=true", ["checkpoint.every=10"]),
    (["logger.wandb.project=x"], "logger.wandb.project=x", ["logger=wandb"]),
    (["data.format=text", "data.train_on_prompt=true"], "data.train_on_prompt=true", ["data.format=alpaca"]),
]


@pytest.mark.parametrize(("chosen", "named", "besides"), WITHOUT_EFFECT, ids=str)
def test_an_option_without_effect_is_named_and_one_with_effect_is_not(
    chosen: list[str], named: str, besides: list[str]
) -> None:
    idle = options_without_effect(load([*MODEL, *chosen]), ranks=8)
    assert len([sentence for sentence in idle if sentence.startswith(named)]) == 1, idle
    assert all("no effect, " in sentence for sentence in idle)
    key = named.partition("=")[0]
    with_effect = options_without_effect(load([*MODEL, *chosen, *besides]), ranks=8)
    assert not [sentence for sentence in with_effect if sentence.startswith(key)], with_effect


@pytest.mark.parametrize(
    "method", ["lisa", "lisa_lean", "lora", "lora_fa", "grass", "owlore", "ist", "badam", "galore", "full"]
)
def test_a_preset_alone_chooses_nothing_in_vain(method: str) -> None:
    idle = options_without_effect(load([*MODEL, f"method={method}"]), ranks=1)
    assert all(sentence.startswith("sampler.active_layers=2, sampler.period=20, sampler.seed") for sentence in idle)
    assert len(idle) == (method in ("full", "galore", "lora", "lora_fa"))


def test_evaluation_without_rows_to_evaluate_on_is_named() -> None:
    config = load([*MODEL, "train.eval_every=5"])
    assert not options_without_effect(config, 1)
    (sentence,) = options_without_effect(config, 1, has_validation=False)
    assert sentence == "train.eval_every=5: has no effect, there is no validation data; set data.validation"


REFUSED = [
    (
        ["sampler.non_block_modules=true"],
        "sampler.non_block_modules=true: .*add always_active.embeddings=false always_active.head=false",
    ),
    (["method=lora", "sampler=uniform", "sampler.non_block_modules=true"], "update=lora has no adapters for embed"),
    (["model.quantization=int8"], "model.quantization=int8: .*update=full_rank, but by update=lora"),
    (["model.quantization=nf4", "update=low_rank"], "model.quantization=nf4: .*update=low_rank"),
    (["model.quantization=int8", "update=lora", "update.dora=true"], "update.dora=true reads the weights"),
    (["model.quantization=int8", "update=lora", "sampler=outlier"], "sampler=outlier looks at weights"),
    (
        ["model.quantization=int8", "update=lora", "sampler=weighted", "sampler.law=weight_norm"],
        "sampler=weighted looks at weights",
    ),
    (["parallel.optimizer_shard=world", "update=low_rank"], "update=low_rank steps something else than"),
    (["parallel.optimizer_shard=world", "optimizer.in_backward=true"], "needs optimizer.in_backward=false"),
    (["parallel.optimizer_shard=world", "parallel.offload=all"], "parallel.offload must be none or frozen"),
    (["parallel.offload=auto", "parallel.activation_checkpointing=auto"], "auto: shares out the memory"),
    (["parallel.block_major=true"], "block_major=true: .*, not with parallel.offload=none; choose one"),
    (["parallel.block_major=true", "parallel.offload=all"], "not with parallel.offload=all"),
    (["parallel.block_major=true", "parallel.offload=frozen", "parallel.replicate=2"], "needs one rank, parallel.rep"),
    (["parallel.block_major=true", "parallel.offload=frozen", "precision.frozen=float32"], "precision.frozen to be"),
    (
        ["parallel.offload=frozen", "parallel.offload_activations=true"],
        "offload_activations=true: goes with parallel.block_major=true alone, .*; set that too, or parallel.off",
    ),
    (["optimizer.in_backward=true", "update=low_rank"], "update=low_rank needs a step's gradients all together"),
    (["optimizer.in_backward=true", "train.on_nonfinite=skip"], "train.on_nonfinite must be stop"),
]


@pytest.mark.parametrize(("chosen", "message"), REFUSED, ids=str)
def test_options_that_exclude_each_other_are_refused(chosen: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_combinations(load([*MODEL, *chosen]))


def test_a_routers_loss_is_refused_where_blocks_are_computed_again_and_nowhere_else() -> None:
    config = load([*MODEL, "model.router_aux_loss=true", "parallel.offload=frozen"])
    with pytest.raises(UserError, match=r"parallel.offload=frozen: .*set model.router_aux_loss=false, or"):
        check_streamed(config, ranks=1)
    check_streamed(config, ranks=2)


def test_the_choice_of_what_stays_on_the_device_is_that_of_one_rank() -> None:
    config = load([*MODEL, "parallel.offload=auto"])
    check_streamed(config, ranks=1)
    with pytest.raises(UserError, match=r"parallel.offload=auto: needs one rank, .*choose parallel.offload=frozen"):
        check_streamed(config, ranks=2)


def test_micro_batches_pass_block_by_block_on_one_rank() -> None:
    config = load([*MODEL, "parallel.offload=frozen", "parallel.block_major=true"])
    check_streamed(config, ranks=1)
    with pytest.raises(UserError, match=r"parallel.block_major=true: needs one rank, .*; set parallel.block_major=fal"):
        check_streamed(config, ranks=2)


def test_blocks_that_are_copied_ahead_on_one_rank_are_prefetched_and_not_gathered() -> None:
    chosen = ["parallel.offload=frozen", "parallel.prefetch=2", "parallel.reshard_after_forward=false"]
    (sentence,) = options_without_effect(load([*MODEL, *chosen]), ranks=1)
    assert sentence.startswith("parallel.reshard_after_forward=false: has no effect")


@dataclass
class BareUpdateConfig(UpdateConfig):
    """An update that nobody knows, which supports nothing."""

    supports_sharded_masters: ClassVar[bool] = False
    supports_step_in_backward: ClassVar[bool] = False
    name: str = "bare"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["model.quantization=int8"], "quantised weights can't be trained by update=bare"),
        (["parallel.optimizer_shard=world"], "update=bare steps something else than parameters"),
        (["optimizer.in_backward=true"], "update=bare needs a step's gradients all together"),
    ],
)
def test_an_update_that_lacks_a_capability_is_refused_by_name(chosen: list[str], message: str) -> None:
    config = load([*MODEL, *chosen])
    with pytest.raises(UserError, match=message):
        check_combinations(replace(config, update=BareUpdateConfig()))
    check_combinations(replace(load(MODEL), update=BareUpdateConfig()))


@dataclass
class AskingSamplerConfig(SamplerConfig):
    """A sampler that nobody knows, which asks for a probe."""

    name: str = "asking"
    kind: str = "hessian_traces"

    @property
    def probe(self) -> ProbeRequest | None:
        return ProbeRequest(self.kind)


def test_a_sampler_that_asks_for_what_nobody_measures_is_refused_by_name() -> None:
    config = load(MODEL)
    with pytest.raises(UserError, match="sampler=asking: asks for the probe hessian_traces, and there are gradient_n"):
        check_combinations(replace(config, sampler=AskingSamplerConfig()))
    check_combinations(replace(config, sampler=AskingSamplerConfig(kind="gradient_norms")))


@pytest.mark.parametrize(("kind", "refused"), [("weight_norms", True), ("gradient_norms", False)])
def test_a_probe_of_weights_needs_weights_that_are_not_quantised(kind: str, refused: bool) -> None:
    config = replace(load([*MODEL, "model.quantization=int8", "update=lora"]), sampler=AskingSamplerConfig(kind=kind))
    if not refused:
        return check_combinations(config)
    with pytest.raises(UserError, match="sampler=asking looks at weights"):
        check_combinations(config)


def test_a_global_batch_is_a_multiple_of_what_the_ranks_take() -> None:
    config = load([*MODEL, "train.global_batch_size=12", "train.micro_batch_size=2"])
    check_global_batch(config.train, ranks=3)
    with pytest.raises(UserError, match=r"train.global_batch_size=12: .* 2 x 4; near are 8 and 16"):
        check_global_batch(config.train, ranks=4)
    with pytest.raises(UserError, match=r"train.global_batch_size=12: .* 2 x 8; near are 16$"):
        check_global_batch(config.train, ranks=8)


def test_gradients_used_at_once_are_not_accumulated() -> None:
    config = load([*MODEL, "optimizer.in_backward=true", "train.global_batch_size=8"])
    check_accumulation(config, ranks=8)
    with pytest.raises(UserError, match=r"train\.global_batch_size=8 must be micro-batch x ranks, 4"):
        check_accumulation(config, ranks=4)


@pytest.mark.parametrize("command", [["train"], ["plan"], ["bench"], ["launch", "slurm"]])
def test_every_command_that_trains_refuses_before_it_starts(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main([*command, *MODEL, "model.quantization=int8"]) == 2
    assert "quantised weights can't be trained by update=full_rank" in capsys.readouterr().err


def test_no_torch_is_needed_to_judge() -> None:
    program = (
        "import sys; from lisa_dist.config.checks import *; from lisa_dist.config.idle_options import *; "
        "from lisa_dist.config.loading import load; "
        "check_combinations(load([])); options_without_effect(load([]), 1); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@pytest.mark.parametrize("content", ["description: [", "description: \x00"])
def test_a_file_of_a_gpu_that_is_no_yaml_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.yaml").write_text(content)
    with pytest.raises(UserError, match=r"plan\.gpu=.*gpu\.yaml: cannot be read as YAML"):
        read_gpu(str(tmp_path / "gpu.yaml"))


@pytest.mark.parametrize("value", ["0", "-1e12", ".nan", ".inf", "fast", "[1]"])
def test_what_a_gpu_can_do_is_a_number_above_0(value: str, tmp_path: Path) -> None:
    text = (conf_dir() / "gpu" / "rtx4090.yaml").read_text()
    (tmp_path / "gpu.yaml").write_text(re.sub(r"(?m)^host_bandwidth: .*", f"host_bandwidth: {value}", text))
    with pytest.raises(UserError, match="every key but description must be a number above 0"):
        read_gpu(str(tmp_path / "gpu.yaml"))


FROZEN_ENDS = ["always_active.embeddings=false", "always_active.norm=false", "always_active.head=false"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["sampler.active_layers=0"], r"sampler\.active_layers=0: trains no block"),
        (["sampler=fixed"], r"sampler\.blocks=\[\]: trains no block"),
    ],
)
def test_a_run_in_which_nothing_trains_is_refused(overrides: list[str], told: str) -> None:
    check_combinations(load([*MODEL, *overrides]))
    for end in range(3):
        check_combinations(load([*MODEL, *overrides, *FROZEN_ENDS[:end], *FROZEN_ENDS[end + 1 :]]))
    check_combinations(load([*MODEL, *FROZEN_ENDS]))
    check_combinations(load([*MODEL, "sampler=all", *FROZEN_ENDS]))
    with pytest.raises(UserError, match=told):
        check_combinations(load([*MODEL, *overrides, *FROZEN_ENDS]))


def test_every_number_is_refused_where_it_is_infinite_or_nan() -> None:
    """In every group, and of every choice of it: a step would use them, or nothing would come of them."""
    parts = [("train", TrainConfig), ("scheduler", SchedulerConfig), ("parallel", ParallelConfig)]
    parts += [("generate", GenerateConfig)]
    parts += [("optimizer", part) for part in OPTIMIZER_CONFIGS.values()]
    parts += [("update", part) for part in UPDATE_CONFIGS.values()]
    parts += [("sampler", part) for part in SAMPLER_CONFIGS.values()]
    tried = set()
    for group, part in parts:
        for number in dataclasses.fields(part):
            if "float" in str(number.type):
                few = {"list": lambda x: [x, 0.5], "dict": lambda x: {"head": x}}.get(str(number.type)[:4], lambda x: x)
                law = {"law": "given"} if number.name == "weights" else {}
                for value in (math.inf, math.nan, -math.inf):
                    with pytest.raises(UserError, match=rf"^{group}\.{number.name}"):
                        part(**{number.name: few(value)}, **law)
                tried.add(f"{group}.{number.name}")
    assert {"optimizer.eps", "update.alpha", "update.scale", "sampler.score_lr", "sampler.weights"} <= tried
