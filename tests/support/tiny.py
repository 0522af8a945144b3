"""A model and a task so small that a run takes the time that its processes need to start."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

TINY = [
    "model=custom",
    "model.init=random",
    "model.tokenizer=builtin:demo",
    "model.architecture={model_type:llama,vocab_size:1024,hidden_size:16,intermediate_size:32,num_hidden_layers:4,"
    "num_attention_heads:2,num_key_value_heads:1,max_position_embeddings:256}",
    "data=demo",
    "data.limit=60",
    "data.sequence_length=64",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.eval_batches=1",
    "optimizer.lr=0.01",
    "sampler.period=3",
    "parallel.cpu_threads=1",
    "parallel.timeout=120",
    "checkpoint.keep=0",
]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOLD = Path(__file__).with_name("hold")


def held(step: int, until: Path) -> dict[str, str]:
    """Return variables under which ranks make ``step`` steps and wait, to be asked to stop or for the file ``until``.

    A run that is asked to stop then makes one step more, or two where every rank heard of it in its wait; none where it
    hears of it in the last step before, of which the row of the step before that is no sign: it is written meanwhile.
    """
    places = [str(HOLD), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(places), "LISA_DIST_HOLD": f"{step}:{until}"}


def free_ports(count: int = 1) -> int:
    """Return the first of ``count`` ports in a row that are free, below those that the system gives to anybody."""
    while True:
        first = random.SystemRandom().randrange(10000, 20000 - count)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue


def rows_of_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return what a run has recorded of its optimizer steps so far, in their order."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def steps_recorded(run_dir: Path) -> list[int]:
    """Return the numbers of these steps."""
    return [row["step"] for row in rows_of_steps(run_dir)]


def read_summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def weights(run_dir: Path, step: int) -> dict[str, bytes]:
    """Return the files of weights of a checkpoint: the same on the same number of ranks where the weights are."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}" / "weights"
    files = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    assert files
    return files


def missing(*programs: str) -> list[str]:
    """Return those of ``programs`` that are not installed on this machine."""
    return [name for name in programs if shutil.which(name, path=SYSTEM_PATH) is None]
