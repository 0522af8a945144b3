"""What blocks keep of activations, in the step that is planned and in probes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_dist.config.loading import load
from lisa_dist.method.module import add_trained_params, allocate, build_train_module, probe
from lisa_dist.planning.simulation import _micro_batch, architecture_of, simulate, simulated_world
from lisa_dist.sharding.ledger import Ledger

MODEL = ["model=tinyllama", "data.sequence_length=1024", "train.micro_batch_size=4", "train.global_batch_size=4"]


@pytest.mark.parametrize("kernels", ["eager", "compile"])
def test_checkpointing_holds_with_kernels_of_blocks(kernels: str) -> None:
    grown = {}
    for kept in ("none", "selective", "full"):
        config = load([*MODEL, f"model.kernels={kernels}", f"parallel.activation_checkpointing={kept}"])
        peaks = simulate(config, num_blocks=5).peaks
        grown[kept] = peaks["forward of block 4 of 5"] - peaks["forward of block 1 of 5"]
    assert grown["full"] < 0.5 * grown["selective"] < 0.5 * grown["none"], grown


@pytest.mark.parametrize("kept", ["none", "full"])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_probe_of_gradients_needs_no_more_than_a_step(kept: str, ranks: int) -> None:
    config = load([*MODEL, "method=grass", f"parallel.activation_checkpointing={kept}"])
    config.model.architecture |= {"num_hidden_layers": 8}
    config.parallel.nproc_per_node, config.train.global_batch_size = str(ranks), 4 * ranks
    planned = simulate(config).peak_bytes
    with simulated_world(ranks):
        train_module = build_train_module(config, architecture_of(config.model))
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger(1) as ledger:
            allocate(train_module, [6, 7], torch.device("cpu"))
            add_trained_params(train_module)
            ledger.phase = "probe"
            request = train_module.sampler.sampler.request()
            probe(train_module, request, lambda count: [_micro_batch(config)] * count)
    assert ledger.peaks["probe"] <= planned + 2**20, "beside what is measured"
