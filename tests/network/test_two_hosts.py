"""Two hosts with a cable between them: what goes over it, and what happens when it is cut or slow."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lisa_dist.config.loading import load
from lisa_dist.planning.simulation import simulate
from tests.launching.tiny import TINY, missing, read_summary, steps_recorded
from tests.network.hosts import Hosts, Run

TIMEOUT = 15  # seconds for a collective
LAYERS, WIDTH, INNER = 4, 128, 384
SETTINGS = [
    *TINY,
    f"model.architecture={{model_type:llama,vocab_size:1024,hidden_size:{WIDTH},intermediate_size:{INNER},"
    f"num_hidden_layers:{LAYERS},num_attention_heads:2,num_key_value_heads:2,max_position_embeddings:256}}",
    "sampler.period=1000",
    "train.max_steps=100000",
    f"parallel.timeout={TIMEOUT}",
    "checkpoint.every=2",
    "checkpoint.keep=2",
]
MICRO_BATCHES = 2  # of a rank a step: a global batch of 4 in micro-batches of 1 on 2 ranks


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

    def start(*overrides: str) -> Run:
        runs.append(Run(hosts, tmp_path, *SETTINGS, f"run.dir={tmp_path / 'run'}", *overrides))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


def planned_bytes(active_layers: int) -> float:
    """Return what a rank sends in a step by the plan; gloo's reduce-scatter is an all-reduce, which sends twice."""
    config = load([*SETTINGS, f"sampler.active_layers={active_layers}", "parallel.nodes=2"])
    sent = simulate(config).work.sent
    return sum(count * (2 if collective == "reduce_scatter" else 1) for collective, count in sent.items())


def block_parameters() -> int:
    return 4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH


def test_short_cut_and_slow_network_are_survived(hosts: Hosts, start: Callable[..., Run], tmp_path: Path) -> None:
    run = start("sampler.active_layers=1")
    run_dir = tmp_path / "run"
    run.wait_until(lambda: len(steps_recorded(run_dir)) >= 8)
    for rank in (0, 1):
        assert run.bytes_of_a_step(rank) == pytest.approx(planned_bytes(1), rel=0.05)
    hosts.plug(connected=False)
    try:
        time.sleep(TIMEOUT / 4)
        reached = len(steps_recorded(run_dir))
    finally:
        hosts.plug(connected=True)
    run.wait_until(lambda: len(steps_recorded(run_dir)) >= reached + 3)
    hosts.slow_down("100mbit")
    try:
        reached = len(steps_recorded(run_dir))
        run.wait_until(lambda: len(steps_recorded(run_dir)) >= reached + 3)
    finally:
        hosts.full_speed()
    run.stop(rank=1)  # one that was asked is enough
    assert run.wait() == [75, 75]
    assert read_summary(run_dir)["exit_reason"] == "signal"


def test_long_cut_ends_every_rank_and_the_run_goes_on_later(
    hosts: Hosts, start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start("sampler.active_layers=3")
    run_dir = tmp_path / "run"
    run.wait_until(lambda: len(steps_recorded(run_dir)) >= 8)
    for rank in (0, 1):
        sent = run.bytes_of_a_step(rank)
        assert sent == pytest.approx(planned_bytes(3), rel=0.05)
        # Against one active block: the gradients of two more, in float32, once a micro-batch, and nothing else.
        more = 2 * block_parameters() * 4 * MICRO_BATCHES
        assert sent - planned_bytes(1) == pytest.approx(more, rel=0.1)
    hosts.plug(connected=False)
    try:
        began = time.monotonic()
        assert run.wait() == [1, 1]
        assert time.monotonic() - began < 4 * TIMEOUT  # both, and neither hangs
    finally:
        hosts.plug(connected=True)
    for rank, log in enumerate(run.logs):
        assert f"LostRankError: rank {rank} waited in" in log.read_text()
    assert read_summary(run_dir)["exit_reason"].startswith("failed: LostRankError: rank 0 waited in")
    last = steps_recorded(run_dir)[-1] + 3
    again = start("sampler.active_layers=3", "checkpoint.resume=auto", f"train.max_steps={last}")
    assert again.wait() == [0, 0], [log.read_text()[-3000:] for log in again.logs]
    assert steps_recorded(run_dir) == list(range(1, last + 1))
    assert len(read_summary(run_dir)["resumed_from"]) == 1
