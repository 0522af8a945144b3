"""The configurations of the golden runs, and what is kept of each: losses, and the weights of its last checkpoint.

``python -m tests.golden`` makes the runs anew and writes golden.json.
"""

from __future__ import annotations

import hashlib
import math
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.telemetry.records import read_rows
from lisa_dist.training import loop
from tests.support.ranks import run_on_ranks
from tests.support.runs import final_tensors

FILE = Path(__file__).with_name("golden.json")
STEPS = 8
# No size is divisible by two ranks; dropout, so that another random state shows.
ARCHITECTURE = (
    "{model_type:llama,vocab_size:1024,hidden_size:18,intermediate_size:27,num_hidden_layers:4,"
    "num_attention_heads:3,num_key_value_heads:1,max_position_embeddings:256,initializer_range:0.1,"
    "attention_dropout:0.1}"
)
SHARED = [
    "model=custom",
    "model.init=random",
    "model.tokenizer=builtin:demo",
    f"model.architecture={ARCHITECTURE}",
    "data=custom",
    "data.format=prompt_completion",
    "data.sequence_length=64",
    f"train.max_steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "optimizer.lr=0.01",
    "optimizer.weight_decay=0.1",
    "scheduler.warmup_steps=2",
    "sampler.active_layers=2",
    "sampler.period=3",
    "parallel.cpu_threads=1",
]
FLOAT32 = ["precision.frozen=float32", "precision.compute=float32"]


@dataclass(frozen=True)
class GoldenRun:
    """A training that is made again: its ranks, its keys beside the shared ones, where it is interrupted."""

    ranks: int
    overrides: list[str]
    float32: bool = False  # so that another machine differs by rounding alone; bfloat16 multiplies each difference
    stop_after: int | None = None  # a first run of so many steps, which the second continues


RUNS = {
    "lisa": GoldenRun(1, ["method=lisa", "data.validation=0.1", "train.eval_every=3"]),
    "lisa, packing": GoldenRun(2, ["method=lisa", "data.packing=true"], float32=True),
    "lisa, offload": GoldenRun(
        2, ["method=lisa", "sampler=sweep", "parallel.offload=frozen", "optimizer.state_on_freeze=offload"]
    ),
    "lisa, resumed": GoldenRun(2, ["method=lisa", "scheduler=constant"], stop_after=4),
    "lora": GoldenRun(2, ["method=lora", "update.rank=4", "update.dropout=0.1"], float32=True),
    "owlore": GoldenRun(
        2, ["method=owlore", "update.rank=4", "update.refresh_every=2", "sampler.threshold=2"], float32=True
    ),
    "grass": GoldenRun(1, ["method=grass", "sampler.probe_every=1"]),
    "full, hybrid": GoldenRun(
        4, ["method=full", "parallel.replicate=2", "parallel.optimizer_shard=world"], float32=True
    ),
}


def made_with() -> dict[str, Any]:
    """What decides the last bits of a result beside the code: where all of it is equal, so is every bit."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": cpu_kernels(),
        "cpu_threads": 1,
    }


def cpu_kernels() -> list[str]:
    """What MKL and oneDNN choose their kernels by and torch's capability does not tell: vendor and matrix units."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.machine(), platform.processor()]
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.split() for key, value in fields.items()}
    flags = fields.get("flags", [])
    units = ("avx512_bf16", "avx512_fp16", "amx_bf16")
    return [platform.machine(), *fields.get("vendor_id", []), *(unit for unit in units if unit in flags)]


def write_rows(file: Path) -> None:
    """Write the data of the runs: sums in words of several lengths, made here so that nothing else changes them."""
    rows = []
    for index in range(60):
        a, b = 7 * index % 31, 11 * index % 23
        answer = f"{a} plus {b} is {a + b}, " + "and so it stays. " * (index % 4)
        rows.append(f'{{"prompt": "What is {a} plus {b}? ", "completion": "{answer.strip()}"}}')
    file.write_text("\n".join(rows) + "\n")


def train_here(config: Config) -> int:
    """Train in this rank. Runs on every rank."""
    return loop.train(config)


def train(run: GoldenRun, folder: Path) -> None:
    """Make a golden run in ``folder``."""
    rows = folder / "rows.jsonl"
    write_rows(rows)
    precision = FLOAT32 if run.float32 else []
    places = [f"data.path={rows}", f"data.cache_dir={folder / 'cache'}", f"run.dir={folder / 'run'}"]
    parts = [["checkpoint.resume=auto"]]
    if run.stop_after is not None:
        parts.insert(0, [f"train.max_steps={run.stop_after}"])
    for more in parts:
        config = load([*SHARED, *places, *precision, *run.overrides, *more])
        assert set(run_on_ranks(run.ranks, train_here, config)) == {0}


def result_of(run_dir: Path) -> dict[str, Any]:
    """What is compared of a run: every float as it is, and a checksum and the norm of each weight at the end."""
    rows, digest, norms = read_rows(run_dir / "metrics.jsonl"), hashlib.sha256(), {}
    for key, tensor in sorted(final_tensors(run_dir).items()):
        kind, _, name = key.partition("/")
        if kind == "weights":
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            norms[name] = math.sqrt(tensor.double().square().sum().item())
    return {
        "active_layers": [row["active_layers"] for row in read_rows(run_dir / "layers.jsonl")],
        "losses": [row["loss"] for row in rows if "loss" in row],
        "grad_norms": [row["grad_norm"] for row in rows if "loss" in row],
        "eval_losses": [row["eval_loss"] for row in rows if "eval_loss" in row],
        "weights_sha256": digest.hexdigest(),
        "weight_norms": norms,
    }


def make(name: str) -> dict[str, Any]:
    """Make the golden run of that name and return what is compared of it."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        train(RUNS[name], Path(folder))
        return result_of(Path(folder) / "run")
