"""Two hosts with a cable between them: what goes over it, and what happens when it is long, slow or cut."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lisa_dist.config.loading import load
from lisa_dist.planning.simulation import simulate
from lisa_dist.training.loop import train
from tests.support.hosts import Hosts, Run
from tests.support.ranks import run_on_ranks
from tests.support.tiny import TINY, missing, read_summary, rows_of_steps

TIMEOUT = 15  # seconds for a collective
SAVED_EVERY = 8  # steps
LAYERS, ACTIVE, WIDTH, INNER = 4, 1, 128, 384
SETTINGS = [
    *TINY,
    f"model.architecture={{model_type:llama,vocab_size:1024,hidden_size:{WIDTH},intermediate_size:{INNER},"
    f"num_hidden_layers:{LAYERS},num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:256}}",
    f"sampler.active_layers={ACTIVE}",
    "sampler.period=1000",
    "precision.compute=float32",  # which any CPU computes fast
    "scheduler=constant",  # whatever train.max_steps is
    "train.global_batch_size=2",
    "train.max_steps=100000",
    f"parallel.timeout={TIMEOUT}",
    f"checkpoint.every={SAVED_EVERY}",
    "checkpoint.keep=2",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    absent = missing("ip", "tc")
    if absent or os.geteuid():
        pytest.skip(
            f"needs root and iproute2 to make network namespaces{', missing: ' if absent else ''}{absent or ''}"
        )
    hosts = Hosts()
    try:
        try:
            hosts.make()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts.remove()


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(steps: int, *overrides: str) -> Run:
        runs.append(Run(hosts, tmp_path, steps, *SETTINGS, f"run.dir={tmp_path / 'run'}", *overrides))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def planned_bytes(active_layers: int) -> float:
    """Return what a rank sends in a step by the plan; gloo's reduce-scatter is an all-reduce, which sends twice."""
    config = load([*SETTINGS, f"sampler.active_layers={active_layers}", "parallel.nodes=2"])
    sent = simulate(config).work.sent
    return sum(count * (2 if collective == "reduce_scatter" else 1) for collective, count in sent.items())


def train_undisturbed(run_dir: str, steps: int) -> None:
    """The same run between processes of one host. Runs on every rank."""
    assert train(load([*SETTINGS, f"run.dir={run_dir}", f"train.max_steps={steps}", "checkpoint.every=0"])) == 0


@pytest.mark.e2e
def test_a_bad_network_costs_time_and_in_the_end_a_restart(
    hosts: Hosts, start: Callable[..., Run], tmp_path: Path
) -> None:
    """The run makes as many steps as it is allowed to: each of the network's faults meets one that is under way."""
    run, run_dir = start(0), tmp_path / "run"
    made = SAVED_EVERY
    run.train_to(made)
    for rank in (0, 1):
        assert run.bytes_of_a_step(rank) == pytest.approx(planned_bytes(ACTIVE), rel=0.05)
    # Frozen blocks send no gradients: those of all blocks would be far outside of what is allowed above.
    assert planned_bytes(LAYERS) > 1.25 * planned_bytes(ACTIVE)

    # First, while TCP knows an answer to take no time: it sends again after twice as long each time.
    with hosts.cut():
        run.allow(made + 1)
        time.sleep(TIMEOUT / 4)
        assert run.steps_made() == [made, made]
    run.train_to(made + 1)
    with hosts.far_apart(seconds=0.05):
        run.train_to(made + 2)  # of some 100 answers that are waited for
    with hosts.slow("100mbit"):
        run.train_to(made + 4)
    with hosts.cut():
        run.allow(made + 5)
        assert run.wait() == [1, 1]  # both, and neither hangs
    for rank, log in enumerate(run.logs):
        assert f"LostRankError: rank {rank} waited in" in log.read_text()
    assert read_summary(run_dir)["exit_reason"].startswith("failed: LostRankError: rank 0 waited in")

    last = made + 6
    again = start(last, "checkpoint.resume=auto", f"train.max_steps={last}")
    assert again.wait() == [0, 0], [log.read_text()[-3000:] for log in again.logs]
    assert len(read_summary(run_dir)["resumed_from"]) == 1
    run_on_ranks(2, train_undisturbed, str(tmp_path / "undisturbed"), last)
    losses, undisturbed = (
        [(row["step"], row["loss"]) for row in rows_of_steps(folder)] for folder in (run_dir, tmp_path / "undisturbed")
    )
    assert losses == undisturbed and len(losses) == last
