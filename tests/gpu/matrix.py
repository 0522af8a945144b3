"""Every option, family and command once, in one process, each with a check of its numbers.

``run_matrix`` is what ``python -m tests.gpu.check`` runs on a GPU; on a CPU it runs the same code on a smaller model.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import lisa_dist.data.demo
from lisa_dist.commands import evaluate, export, generate, report
from lisa_dist.config import Config
from lisa_dist.config.loading import load, load_run
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.method.module import begin_period
from lisa_dist.method.updates.sharded import whole
from lisa_dist.runtime import distributed
from lisa_dist.training.loop import train
from lisa_dist.training.step import accumulate_gradients
from tests.support.families import _COMMON, _FIELDS, FAMILIES, tiny_config
from tests.support.small_training import build_and_load, full_parameters
from tests.support.tiny import TINY, rows_of_steps

STEPS, PERIOD = 6, 2
BASE = [
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.eval_every=0",
    "train.sample_prompts=0",
    f"sampler.period={PERIOD}",
    "optimizer.lr=0.004",
    "scheduler=constant",
    "scheduler.warmup_steps=0",
    "checkpoint.every=3",
    "checkpoint.keep=0",
    "parallel.nproc_per_node=1",
    "model.kernels=eager",  # compiling each would take most of the time
    "data.sequence_length=64",
    "data.limit=8",  # the rows of one step, so that losses fall
]
PACKED = ["data.packing=true", "data.limit=60", "train.global_batch_size=4", "train.micro_batch_size=2"]
LORA = ["method=lora"]
OFFLOADED = ["parallel.offload=frozen"]

# What trains and learns: the loss of its last step is below that of its first.
LEARNS: dict[str, list[str]] = {
    "lisa": [],
    **{method: [f"method={method}"] for method in ("full", "lisa_lean", "lora", "lora_fa", "grass", "ist", "badam")},
    "galore": ["method=galore", "update.rank=8"],
    "owlore": ["method=owlore", "update.rank=8", "sampler.active_layers=2"],
    **{sampler: [f"sampler={sampler}"] for sampler in ("coverage", "bandit", "weighted")},
    "randomized projector": ["method=galore", "update.rank=8", "update.projector=randomized"],
    "adamw8bit": ["optimizer=adamw8bit"],
    "lion": ["optimizer=lion", "optimizer.lr=0.001"],
    "state offload": ["optimizer.state_on_freeze=offload"],
    "ends frozen": [f"always_active.{part}=false" for part in ("embeddings", "norm", "head")],
    "dora": [*LORA, "update.dora=true"],
    "rslora": [*LORA, "update.rslora=true"],
    "nf4": [*LORA, "model.quantization=nf4"],
    "int8": [*LORA, "model.quantization=int8"],
    "skip": ["train.on_nonfinite=skip"],
    "spike": ["train.spike_factor=3"],
    "evaluation and answers": ["train.eval_every=3", "train.sample_prompts=2"],
}

# What must change no number but by rounding: the losses are those without it.
CHANGES_NOTHING: dict[str, tuple[list[str], list[str]]] = {
    "offload frozen": ([], OFFLOADED),
    "offload all": ([], ["parallel.offload=all"]),
    "offload frozen, lora": (LORA, OFFLOADED),
    "block-major": ([], [*OFFLOADED, "parallel.block_major=true"]),
    "block-major, inputs in host memory": (
        [],
        [*OFFLOADED, "parallel.block_major=true", "parallel.offload_activations=true"],
    ),
    "block-major, lora": (LORA, [*OFFLOADED, "parallel.block_major=true"]),
    "offload frozen, one slot": ([], [*OFFLOADED, "parallel.prefetch=0"]),
    "in backward": (["train.global_batch_size=4", "optimizer.grad_clip=0"], ["optimizer.in_backward=true"]),
    **{
        f"checkpointing {kind}": ([], [f"parallel.activation_checkpointing={kind}"])
        for kind in ("full", "selective", "auto")
    },
    "no reshard": ([], ["parallel.reshard_after_forward=false"]),
    "defer": ([], ["parallel.defer_reduction=true"]),
    "eager": ([], ["model.attention=eager"]),
    "eager, packed": (PACKED, ["model.attention=eager"]),
    "loss in chunks": ([], ["model.loss_chunk=16"]),
}
ON_A_GPU: dict[str, tuple[list[str], list[str]]] = {  # or with minutes of compiling
    "flex, packed": (PACKED, ["model.attention=flex_attention"]),
    "compile": ([], ["model.kernels=compile"]),
    "compile, selective": ([], ["model.kernels=compile", "parallel.activation_checkpointing=selective"]),
    "compile, packed": (PACKED, ["model.kernels=compile"]),
    "compile, lora": (LORA, ["model.kernels=compile"]),
    "compile, offload": ([], ["model.kernels=compile", *OFFLOADED]),
    "liger": ([], ["model.kernels=liger"]),
    "liger, packed": (PACKED, ["model.kernels=liger"]),
    "liger, offload": ([], ["model.kernels=liger", *OFFLOADED]),
}
RESUMED: dict[str, list[str]] = {
    "lisa": [],
    "async": ["checkpoint.async=true"],
    "incremental": ["checkpoint.full_every=3", "checkpoint.every=1"],
    "offload frozen": OFFLOADED,
    "8 bit": ["optimizer=adamw8bit"],
    "galore": ["method=galore", "update.rank=8"],
}


@dataclass
class Matrix:
    """The runs that were made, each once, below one folder."""

    folder: Path
    tiny: bool  # a model for a CPU
    made: dict[tuple[str, ...], Path] = field(default_factory=dict)

    @property
    def model(self) -> list[str]:
        """The model, and the arithmetic that this device is quick with."""
        if self.tiny:
            return [*TINY, "precision.frozen=float32", "precision.compute=float32"]
        return ["precision.compute=bfloat16"]

    def trained(self, overrides: list[str], fresh: bool = False) -> Path:
        """Return the directory of a run with these overrides, made now unless it was before."""
        key = tuple(overrides)
        if fresh or key not in self.made:
            directory = self.folder / f"run_{len(list(self.folder.iterdir()))}"
            assert train(load([*self.model, *BASE, *overrides, f"run.dir={directory}"])) == 0
            self.made[key] = directory
        return self.made[key]

    def losses(self, overrides: list[str]) -> list[float]:
        """Return the losses of the steps of a run with these overrides."""
        found = losses_in(self.trained(overrides))
        assert len(found) == STEPS and all(map(math.isfinite, found)), found
        return found


def losses_in(directory: Path) -> list[float]:
    """Return the losses of a run's steps."""
    return [row["loss"] for row in rows_of_steps(directory)]


def learns(matrix: Matrix, overrides: list[str]) -> str:
    """Train and see the loss fall."""
    found = matrix.losses(overrides)
    assert found[-1] < found[0], found
    return f"loss {found[0]:.3f} -> {found[-1]:.3f}"


def changes_nothing(matrix: Matrix, base: list[str], change: list[str]) -> str:
    """Train with and without a change; the losses differ by what the dtype of the arithmetic rounds at most."""
    expected, found = matrix.losses(base), matrix.losses([*base, *change])
    apart = max(abs(one - other) / abs(one) for one, other in zip(expected, found))
    assert apart < (1e-4 if matrix.tiny else 0.02), (expected, found)
    return f"losses within {apart:.1e} of those without it"


def resumes(matrix: Matrix, overrides: list[str]) -> str:
    """Train in one go and in two; the losses are equal, bit for bit but where a resume rounds."""
    straight = matrix.losses(overrides)
    rounded = "optimizer=adamw8bit" in overrides  # a resume rounds its moments once more
    cut = matrix.trained([*overrides, "train.max_steps=3"], fresh=True)
    settled = [f"run.dir={cut}", "checkpoint.resume=auto"]
    assert train(load([*matrix.model, *BASE, *overrides, *settled])) == 0
    apart = max(abs(one - other) / abs(other) for one, other in zip(losses_in(cut), straight, strict=True))
    assert apart <= (0.01 if rounded else 0), (losses_in(cut), straight)
    return f"{STEPS} losses within {apart:.1e}" if rounded else f"{STEPS} losses equal bit for bit"


def family(name: str) -> str:
    """Loss and gradients of a family on this device, in fp32, against transformers' own model on the CPU."""
    kind, fields = _FIELDS[name]
    fixed = ["method=full", "model.kernels=eager", "precision.compute=float32", "parallel.nproc_per_node=1"]
    config = load(["model=custom", "model.init=random", "data=custom", *fixed])
    config.model.architecture = {**_COMMON, **fields, "model_type": kind}
    module = build_and_load(config, distributed.device())
    begin_period(module, 0)
    ids = torch.randint(3, 128, (2, 48), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48).expand(2, 48).contiguous()
    expected = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).train()
    weights = {key: weight.cpu() for key, weight in full_parameters(module).items()}
    assert not expected.load_state_dict(weights, strict=False).unexpected_keys
    loss = expected(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    summed, divisor = accumulate_gradients(module, [{"input_ids": ids, "labels": ids, "position_ids": positions}])
    found = float(summed) / divisor
    assert abs(found - loss.item()) < 1e-3 * loss.item(), (found, loss.item())
    products = torch.zeros(3, dtype=torch.float64)
    for key, parameter in expected.named_parameters():
        gradient = module.store.master(key).grad
        gradient = None if gradient is None else whole(gradient)
        if gradient is None or parameter.grad is None:  # an expert that no token was sent to
            assert gradient is None or parameter.grad is None or not gradient.any()
            continue
        ours, theirs = gradient.cpu().double().flatten() / divisor, parameter.grad.double().flatten()
        products += torch.stack([ours @ theirs, ours @ ours, theirs @ theirs])
    cosine = float(products[0] / (products[1] * products[2]).sqrt())
    longer = float((products[1] / products[2]).sqrt())
    assert cosine > 0.999 and abs(longer - 1) < 0.01, (cosine, longer)
    return f"loss {found:.4f}, gradients' cosine {cosine:.6f}"


def evaluated(matrix: Matrix, config: Config) -> float:
    """Return the held-out loss that ``evaluate`` writes."""
    config.evaluate.data = str(Path(lisa_dist.data.demo.__file__).with_name("validation.jsonl"))
    config.evaluate.limit = 16
    config.evaluate.output = str(matrix.folder / f"evaluation_{len(list(matrix.folder.iterdir()))}.json")
    with contextlib.redirect_stdout(io.StringIO()):
        assert evaluate.run(config) == 0
    return float(json.loads(Path(config.evaluate.output).read_text())["eval_loss"])


def answered(matrix: Matrix, config: Config) -> list[str]:
    """Return the answers that ``generate`` writes."""
    config.generate.prompts = ["What comes after March?", "What is 2 and 3?"]
    config.generate.max_new_tokens = 8
    config.generate.output = str(matrix.folder / f"answers_{len(list(matrix.folder.iterdir()))}.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        assert generate.run(config) == 0
    return [json.loads(line)["answer"] for line in Path(config.generate.output).read_text().splitlines()]


def exported(matrix: Matrix, overrides: list[str]) -> str:
    """Export a run; the directory has the held-out loss and the answers of the checkpoint."""
    run_dir, target = matrix.trained(overrides), matrix.folder / f"exported_{len(list(matrix.folder.iterdir()))}"
    config = load_run(str(run_dir), [f"export.path={target}"])
    with contextlib.redirect_stdout(io.StringIO()):
        assert export.run(config) == 0
    exact = ["precision.frozen=float32", f"precision.compute={config.precision.compute}"]
    again = ["model=custom", "data=custom", "data.sequence_length=64", *exact]
    losses = [evaluated(matrix, load_run(str(run_dir), []))]
    losses.append(evaluated(matrix, load([*again, f"evaluate.path={target}"])))
    assert abs(losses[0] - losses[1]) < (1e-4 if matrix.tiny else 0.02) * losses[0], losses
    answers = answered(matrix, load_run(str(run_dir), []))
    assert len(answers) == 2
    if matrix.tiny:  # in bf16 the words may part where two are equally likely
        assert answers == answered(matrix, load([*again, f"generate.path={target}"]))
    return f"held-out loss {losses[0]:.4f}, of the export {losses[1]:.4f}"


def reported(matrix: Matrix) -> str:
    """Draw the page of a run."""
    run_dir = matrix.trained([])
    with contextlib.redirect_stdout(io.StringIO()):
        assert report.run(load_run(str(run_dir), [])) == 0
    page = (RunDirectory(run_dir).path / "report.html").read_text()
    assert "blocks" in page and "svg" in page
    return f"{len(page)} characters"


def launched(matrix: Matrix) -> str:
    """Train by the command line, which starts its ranks itself; the losses are those of this process."""
    expected, directory = matrix.losses([]), matrix.folder / f"launched_{len(list(matrix.folder.iterdir()))}"
    command = [sys.executable, "-m", "lisa_dist", "train", *matrix.model, *BASE, f"run.dir={directory}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    apart = max(abs(one - other) / other for one, other in zip(losses_in(directory), expected, strict=True))
    assert apart < (1e-4 if matrix.tiny else 0.02), (losses_in(directory), expected)
    return f"losses within {apart:.1e} of those of a process that was there"


def checks(matrix: Matrix) -> dict[str, Callable[[], str]]:
    """Return every check by its name, in the order in which they are made."""
    found: dict[str, Callable[[], str]] = {}
    for name, overrides in LEARNS.items():
        found[name] = lambda overrides=overrides: learns(matrix, overrides)  # type: ignore[misc]
    for name, (base, change) in (CHANGES_NOTHING | ({} if matrix.tiny else ON_A_GPU)).items():
        found[name] = lambda base=base, change=change: changes_nothing(matrix, base, change)  # type: ignore[misc]
    for name, overrides in RESUMED.items():
        found[f"resume {name}"] = lambda overrides=overrides: resumes(matrix, overrides)  # type: ignore[misc]
    found["export"] = lambda: exported(matrix, [])
    found["export lora"] = lambda: exported(matrix, LORA)
    found["report"] = lambda: reported(matrix)
    found["command line"] = lambda: launched(matrix)
    for name in FAMILIES:
        found[f"family {name}"] = lambda name=name: family(name)  # type: ignore[misc]
    return found
