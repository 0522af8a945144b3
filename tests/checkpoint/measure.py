"""Measures what checkpoints cost; its numbers are in docs/reliability.md. Run: python -m tests.checkpoint.measure

One process, a LLaMA of 173 M parameters in 24 blocks, 2 of them active. Times are medians of alternating pairs, so
that other work on the machine meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from lisa_dist import distributed
from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import newest_complete, restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config
from lisa_dist.config.loading import load
from lisa_dist.learner import Learner, begin_period, build_learner, load_initial_weights

PAIRS = 9
ARCHITECTURE = (
    "{model_type:llama,vocab_size:2000,hidden_size:768,intermediate_size:2048,num_hidden_layers:24,"
    "num_attention_heads:12,num_key_value_heads:12,max_position_embeddings:256}"
)


def make_learner(config: Config) -> Learner:
    learner = build_learner(config)
    load_initial_weights(learner, torch.device("cpu"))
    begin_period(learner, 0)
    return learner


def bytes_of(directory: Path) -> tuple[int, int]:
    """The bytes of a checkpoint's weights and of all of it."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sum(f.stat().st_size for f in files if f.parent.name == "weights"), sum(f.stat().st_size for f in files)


def main() -> None:
    choices = [
        "model=custom",
        "model.init=random",
        "sampler.period=1",
        f"model.architecture={ARCHITECTURE}",
        "checkpoint.keep=2",
    ]
    distributed.initialize(load(choices).parallel)
    with tempfile.TemporaryDirectory() as folder:
        learner = make_learner(load(choices))
        at_once = CheckpointSaver(learner, Path(folder), "")
        learner.config.checkpoint.full_every = 1
        background = CheckpointSaver(learner, Path(folder), "")
        background.config = load([*choices, "checkpoint.async=true"]).checkpoint
        stalls: dict[str, list[float]] = {"at once": [], "background": []}
        for pair in range(PAIRS + 1):
            for name, saver in (("at once", at_once), ("background", background)):
                begun = time.perf_counter()
                saver.save(Progress(step=2 * pair + (name == "background")))
                stalls[name].append(time.perf_counter() - begun)
                saver.finish()
        ratios = [b / a for a, b in zip(stalls["at once"][1:], stalls["background"][1:])]  # the first pair allocates
        print(f"save at once: {statistics.median(stalls['at once'][1:]):.3f} s (median of {PAIRS})")
        print(f"stall of a save in the background: {statistics.median(stalls['background'][1:]):.3f} s")
        print(f"ratio: {statistics.median(ratios):.1%} (from {min(ratios):.1%} to {max(ratios):.1%})")

        newest = newest_complete(Path(folder))
        assert newest is not None
        restores = []
        for _ in range(PAIRS):
            learner.optimizer.release(list(learner.optimizer.parameters))
            begun = time.perf_counter()
            newest_complete(Path(folder))
            checked = time.perf_counter()
            restore_checkpoint(learner, newest, torch.device("cpu"))
            restores.append((checked - begun, time.perf_counter() - checked))
        check, read = (statistics.median(times) for times in zip(*restores))
        print(f"to resume: {check:.3f} s for the checksums, {read:.3f} s to read")

    with tempfile.TemporaryDirectory() as folder:
        learner = make_learner(load([*choices, "checkpoint.full_every=10"]))
        saver = CheckpointSaver(learner, Path(folder), "")
        saver.save(Progress(step=1))
        saver.save(Progress(step=2))
        begin_period(learner, 1)
        saver.note_trained()
        saver.save(Progress(step=3))
        full = bytes_of(Path(folder) / checkpoint_name(1))
        total = sum(learner.sharded.parameter(name).numel() for name in learner.sharded.handles)
        for step, kind in ((1, "full"), (2, "same blocks"), (3, "after a switch")):
            weights, everything = bytes_of(Path(folder) / checkpoint_name(step))
            print(
                f"{kind}: {everything / 1e6:.1f} MB, weights {weights / 1e6:.1f} MB ({weights / full[0]:.1%} of full)"
            )
        trained = sum(parameter.numel() for parameter in learner.optimizer.parameters.values())
        print(f"parameters: {total / 1e6:.1f} M, trained {trained / 1e6:.1f} M")


if __name__ == "__main__":
    main()
