"""Measures what checkpoints cost, for docs/reliability.md. Run: python -m tests.support.measure_checkpoints

One process, a LLaMA of 173 M parameters in 24 blocks, 2 of them active. Times are medians of alternating rounds, so
that other work on the machine meets all kinds. A stall is the time for which the training thread stands still: in the
save, and before the optimizer's step or the switch until what they change is copied. ``--folder`` chooses the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import newest_complete, restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.method.module import TrainModule, begin_period
from lisa_dist.runtime import distributed
from lisa_dist.training.step import train_step
from tests.support.small_training import build_and_load

ROUNDS = 7
ARCHITECTURE = (
    "{model_type:llama,vocab_size:2000,hidden_size:768,intermediate_size:2048,num_hidden_layers:24,"
    "num_attention_heads:12,num_key_value_heads:12,max_position_embeddings:256}"
)


def make_learner(config: Config) -> TrainModule:
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    return train_module


def bytes_of(directory: Path) -> tuple[int, int]:
    """The bytes of a checkpoint's weights and of all of it."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sum(f.stat().st_size for f in files if f.parent.name == "weights"), sum(f.stat().st_size for f in files)


class Stall:
    """Adds up for how long the training thread stands still for checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, waiting: Callable[[], object]) -> None:
        begun = time.perf_counter()
        waiting()
        self.seconds += time.perf_counter() - begun


def train_one_step(train_module: TrainModule) -> float:
    """Make a step on random tokens; the seconds that it took."""
    ids = torch.randint(0, 2000, (1, 64))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64)[None]}
    begun = time.perf_counter()
    train_step(train_module, [batch], 0, 100)
    return time.perf_counter() - begun


def measure_stalls(train_module: TrainModule, choices: list[str], folder: Path) -> None:
    """Save at once; in the background before a step; in the background before a switch of blocks; by turns."""
    savers = {
        name: CheckpointSaver(train_module, folder, "") for name in ("at once", "before a step", "before a switch")
    }
    for name in ("before a step", "before a switch"):
        savers[name].writer.config = load([*choices, "checkpoint.async=true"]).checkpoint
    savers["before a switch"].writer.staging = savers["before a step"].writer.staging
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    slowed: list[float] = []
    for turn in range(ROUNDS + 1):
        alone = train_one_step(train_module)
        for number, (name, saver) in enumerate(savers.items()):
            stall = Stall()
            train_module.optimizer.before_change = partial(stall.of, saver.writer.copied.wait)
            stall.of(partial(saver.save, Progress(step=3 * turn + number)))
            if name == "before a step":
                slowed.append(train_one_step(train_module) - alone)
            if name == "before a switch":
                begin_period(train_module, turn + 1)
            stalls[name].append(stall.seconds)
            saver.finish()
    at_once = stalls["at once"][1:]
    print(f"save at once: {statistics.median(at_once):.3f} s (median of {ROUNDS})")
    for name in ("before a step", "before a switch"):
        found = stalls[name][1:]
        ratios = [background / whole for whole, background in zip(at_once, found)]
        print(f"stall in the background, {name}: {statistics.median(found):.3f} s, first {stalls[name][0]:.3f} s")
        print(f"  of a save at once: {statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})")
    print(f"a step of {alone:.2f} s takes longer while it is written: {statistics.median(slowed[1:]):.3f} s")
    print(f"host memory of the copies: {savers['before a step'].writer.staging.block.nbytes / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--folder", help="where checkpoints are written; the default is the system's for temporary files"
    )
    disk = parser.parse_args().folder
    choices = [
        "model=custom",
        "model.init=random",
        "sampler.period=1",
        f"model.architecture={ARCHITECTURE}",
        "checkpoint.keep=2",
        "parallel.cpu_threads=1",
    ]
    distributed.initialize(load(choices).parallel)
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        train_module = make_learner(load(choices))
        measure_stalls(train_module, choices, Path(folder))

        newest = newest_complete(Path(folder))
        assert newest is not None
        restores = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            newest_complete(Path(folder))
            checked = time.perf_counter()
            restore_checkpoint(train_module, newest, torch.device("cpu"), {})
            restores.append((checked - begun, time.perf_counter() - checked))
        check, read = (statistics.median(times) for times in zip(*restores))
        print(f"to resume: {check:.3f} s for the checksums, {read:.3f} s to read")

    with tempfile.TemporaryDirectory(dir=disk) as folder:
        train_module = make_learner(load([*choices, "checkpoint.full_every=10"]))
        saver = CheckpointSaver(train_module, Path(folder), "")
        saver.save(Progress(step=1))
        saver.save(Progress(step=2))
        begin_period(train_module, 1)
        saver.note_trained()
        saver.save(Progress(step=3))
        full = bytes_of(Path(folder) / checkpoint_name(1))
        total = sum(train_module.store.parameter(name).numel() for name in train_module.store.names)
        for step, kind in ((1, "full"), (2, "same blocks"), (3, "after a switch")):
            weights, everything = bytes_of(Path(folder) / checkpoint_name(step))
            print(
                f"{kind}: {everything / 1e6:.1f} MB, weights {weights / 1e6:.1f} MB ({weights / full[0]:.1%} of full)"
            )
        trained = sum(parameter.numel() for parameter in train_module.optimizer.parameters.values())
        print(f"parameters: {total / 1e6:.1f} M, trained {trained / 1e6:.1f} M")


if __name__ == "__main__":
    main()
