"""The store whose frozen blocks lie in host memory: the resident store's numbers to the last bit, and what travels.

The link delivers late and spoils a slot when it is handed back, so that a race shows as numbers that are none.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.method.module import add_trained_params, allocate, begin_period, load_initial_weights
from lisa_dist.planning.phases import SWITCH
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime.units import GIB
from lisa_dist.sharding import pinned, streamed
from lisa_dist.sharding.link import Link
from lisa_dist.sharding.pinned import PinnedPool
from lisa_dist.sharding.streamed import StreamedStore
from lisa_dist.training.step import train_step
from tests.support.ranks import run_on_ranks
from tests.support.simulated_link import SimulatedLink
from tests.support.small_training import build_and_load, make_global_batches
from tests.support.streamed_training import BF16, CPU, FROZEN_ENDS, TIED, built, configured, filled, run_steps, weights

KIB = 2**-20  # in GiB


def train_in_each_store(config: Config, slots: list[int]) -> None:
    """Compare losses, weights and what samplers saw of the stores. Runs on one rank."""
    resident = filled(config, "none")
    expected = run_steps(resident)
    for count in slots:
        with mock.patch.object(streamed, "link_to", lambda device: SimulatedLink()):
            train_module = filled(config, "frozen", count)
        assert run_steps(train_module) == expected
        assert train_module.store.link_bytes > 0
        # Squares of gradients are summed in the order in which they arrive, which is another one.
        assert (train_module.sampler.scores() or []) == pytest.approx(resident.sampler.scores() or [], rel=1e-6)
        kept = weights(resident)
        for name, tensor in weights(train_module).items():
            assert tensor.dtype == kept[name].dtype and torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize(
    ("overrides", "precision", "family", "architecture", "slots"),
    [
        pytest.param(["method=lisa"], {}, "llama", {}, [1, 2, 5], id="lisa"),
        pytest.param(["method=lisa", *FROZEN_ENDS], BF16, "llama", TIED, [2], id="lisa, frozen ends, tied"),
        pytest.param(["method=lora", *FROZEN_ENDS], BF16, "llama", {}, [2, 3], id="lora, frozen ends"),
        pytest.param(["method=grass"], BF16, "llama", TIED, [2], id="grass"),
        pytest.param(["method=owlore", *FROZEN_ENDS], BF16, "llama", {}, [3], id="owlore"),
        pytest.param(["method=ist"], {}, "llama", {}, [2], id="ist"),
        pytest.param(["method=lisa"], {}, "gpt2", {"resid_pdrop": 0.2}, [2], id="gpt2 with dropout"),
        pytest.param(["method=lisa", *FROZEN_ENDS], BF16, "gemma3", {}, [2], id="gemma3, frozen ends"),
        pytest.param(
            ["method=lisa"], {}, "qwen2_moe", {"mlp_only_layers": [0]}, [2], id="qwen2_moe, blocks of two sizes"
        ),
        pytest.param(["method=lora"], {}, "gpt_neox", {}, [2], id="gpt_neox"),
        pytest.param(["method=lisa", "data.packing=true"], {}, "llama", {"hidden_size": 48}, [2], id="packed"),
    ],
)
def test_training_is_that_of_the_resident_store(
    overrides: list[str], precision: dict[str, str], family: str, architecture: dict[str, Any], slots: list[int]
) -> None:
    run_on_ranks(1, train_in_each_store, configured(overrides, precision, family, **architecture), slots)


def resume_across(directory: Path) -> None:
    """Save at every step from one store, in the background, and go on from it in the other. Runs on one rank."""
    config = configured(["method=lisa"], BF16, "llama")
    config.checkpoint = load(["checkpoint.keep=0", "checkpoint.full_every=3", "checkpoint.async=true"]).checkpoint
    expected = None
    for offload, other in (("none", "frozen"), ("frozen", "none")):
        train_module, path = filled(config, offload), directory / offload
        saver = CheckpointSaver(train_module, path, to_yaml(config))
        losses = run_steps(train_module, saver=saver)
        saver.finish(stop_on_error=True)
        expected = expected or (losses, weights(train_module))
        assert losses == expected[0]
        for saved in (2, 3):
            again = built(config, other)
            restore_checkpoint(again, path / checkpoint_name(saved), CPU, data={})
            run_steps(again, saved)
            for name, tensor in weights(again).items():
                assert torch.equal(tensor, expected[1][name]), (offload, saved, name)


def test_checkpoints_in_the_background_go_into_the_store_and_out_of_it(tmp_path: Path) -> None:
    run_on_ranks(1, resume_across, tmp_path)


def journeys(overrides: list[str], slots: int) -> Any:
    """What happens to which block in the three micro-batches of a second step, and all misses. Runs on one rank."""
    with mock.patch.object(streamed, "link_to", lambda device: SimulatedLink()):
        train_module = filled(configured(overrides, {}, "llama"), "frozen", slots)
    begin_period(train_module, 0)
    batches, store = make_global_batches(2, 3), train_module.store
    assert isinstance(store, StreamedStore) and isinstance(store.link, SimulatedLink)
    train_step(train_module, batches[0], 0, 2)
    store.link.timeline.clear()
    train_step(train_module, batches[1], 1, 2)
    return [f"{kind} {block}" for kind, block, _ in store.link.timeline], store.link_misses


FIXED = ["sampler=fixed", "sampler.blocks=[3]"]  # of five blocks


def test_what_comes_next_is_on_its_way_before_a_block_computes() -> None:
    timeline, misses = run_on_ranks(1, journeys, FIXED, 2)[0]
    upwards = ["use 0", "done 0", "fetch 2", "use 1", "done 1", "fetch 4", "use 2", "done 2", "use 4", "done 4"]
    downwards = ["use 4", "done 4", "fetch 1", "use 2", "done 2", "fetch 0", "use 1", "done 1", "use 0", "done 0"]
    assert timeline == 3 * (upwards + downwards), "block 0 is there still, and block 1 was the last but one"
    assert misses == 1, "but for the first block after a switch"


def test_blocks_that_no_gradient_reaches_travel_once() -> None:
    timeline, misses = run_on_ranks(1, journeys, [*FIXED, *FROZEN_ENDS], 2)[0]
    assert [event for event in timeline if event[0] == "u"] == 3 * ["use 0", "use 1", "use 2", "use 4", "use 4"]
    assert len([event for event in timeline if event[0] == "f"]) == 3 * 4 and misses == 1


def copied_in_steps(config: Config) -> list[int]:
    """The bytes that the first two steps of a period copy to the device. Runs on one rank."""
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    return [
        train_step(train_module, batch, 0, 2).link_bytes
        for batch in make_global_batches(2, config.train.global_batch_size)
    ]


@pytest.mark.parametrize(("ends", "copies"), [([], 8), (FROZEN_ENDS, 6)], ids=["ends train", "ends frozen"])
def test_what_is_copied_in_a_step_is_planned(ends: list[str], copies: int) -> None:
    config = configured(["sampler=fixed", "sampler.blocks=[5]", *ends], {}, "llama", num_hidden_layers=7)
    config.parallel = dataclasses.replace(config.parallel, offload="frozen", prefetch=1)
    config.train = dataclasses.replace(config.train, global_batch_size=4, micro_batch_size=1)
    first, second = run_on_ranks(1, copied_in_steps, config)[0]
    block = second // (4 * copies)
    assert first == second + 2 * block, "what a step begins with is there from the one before"
    assert simulate(config).work.link_bytes == second


def refusal_of_host_memory() -> str:
    """What is said where a byte too few is free. Runs on one rank."""
    train_module = built(configured(["method=lisa"], BF16, "llama"), "frozen")
    needed = sum(2 * parameter.numel() for parameter in train_module.store.layers.blocks[0].parameters()) * 5
    with mock.patch.object(streamed, "free_host_bytes", lambda: needed - 1), pytest.raises(UserError) as refused:
        load_initial_weights(train_module, CPU)
    return str(refused.value)


def test_too_little_host_memory_is_told_before_weights_are_read() -> None:
    message = run_on_ranks(1, refusal_of_host_memory)[0]
    assert message.startswith("parallel.offload: the frozen blocks that stream need") and "are free; take" in message


def allocate_again(config: Config) -> tuple[int, int]:
    """Bytes of pinned memory that a first allocation takes, and another one beside it. Runs on one rank."""
    taken: list[int] = []

    class Pinned:
        def __init__(self, size: int) -> None:
            self.bytes = bytearray(size)
            taken.append(size)

    class PinningLink(Link):
        def __init__(self) -> None:
            super().__init__()
            self.pool = PinnedPool()

        def host_buffer(self, size: int) -> torch.Tensor:
            return self.pool.take(size)

    with (
        mock.patch.object(pinned, "PinnedMemory", Pinned),
        mock.patch.object(streamed, "link_to", lambda device: PinningLink()),
    ):
        train_module = built(config, "frozen")
        allocate(train_module, [0], CPU)
        first = sum(taken)
        with mock.patch.object(streamed, "free_host_bytes", lambda: 0):  # what it has leaves no room beside it
            allocate(train_module, [1], CPU)
    return first, sum(taken) - first


def test_going_back_takes_host_memory_once() -> None:
    first, again = run_on_ranks(1, allocate_again, configured(["method=lisa"], BF16, "llama"))[0]
    assert first > 0 and again == 0


def train_within(limits: list[float]) -> list[tuple[list[int], list[float]]]:
    """The blocks that are copied and the losses under limits of memory, in GiB. Runs on one rank."""
    found = []
    for limit in limits:
        config = configured(["method=lisa"], BF16, "llama")
        # So that a block that stays costs its weights, some 48 KiB, and nothing besides.
        config.parallel = dataclasses.replace(config.parallel, memory_limit=limit, activation_checkpointing="full")
        train_module = filled(config, "auto")
        losses = run_steps(train_module)
        store = train_module.store
        streaming = [block for block in range(5) if store.recomputes(block)]
        assert all(store.on_host(name) for block in streaming for name in store.block_parameters(block))
        train_module.optimizer.remove_all()
        allocate(train_module, train_module.active.blocks, CPU)  # a resume, where the same have to stay
        add_trained_params(train_module)
        assert streaming == [block for block in range(5) if store.recomputes(block)]
        found.append((streaming, losses))
    return found


def test_as_many_frozen_blocks_stay_on_the_device_as_fit_with_the_same_numbers() -> None:
    (streaming, losses), (none, same) = run_on_ranks(1, train_within, [2 + 2590 * KIB, 2.01])[0]
    assert streaming == [3, 4] and none == [], "one of three frozen blocks stays"
    assert losses == same
    with pytest.raises(
        AssertionError, match=r"UserError: parallel.offload=auto: needs .* more with every frozen block in"
    ):
        run_on_ranks(1, train_within, [2 + 2400 * KIB])


def train_beside_a_small_host(config: Config, free: int) -> tuple[list[set[int]], list[int]]:
    """The blocks that stay, in turn, and the bytes in host memory, of which ``free`` are there. Runs on one rank."""
    resident = filled(config, "none")
    expected = run_steps(resident)
    kept: list[set[int]] = []
    hosted: list[int] = []
    keep_on_device, pack = StreamedStore.keep_on_device, StreamedStore._pack

    def watch_kept(store: StreamedStore, blocks: list[int]) -> None:
        keep_on_device(store, blocks)
        kept.append({*blocks})

    def watch_hosted(store: StreamedStore, block: int) -> None:
        pack(store, block)
        if store.device.type != "meta":
            hosted.append(sum(hosted.buffer.nbytes for hosted in store._hosted.values()))

    with (
        mock.patch.object(streamed, "link_to", lambda device: SimulatedLink()),
        mock.patch.object(streamed, "free_host_bytes", lambda: free),
        mock.patch.object(StreamedStore, "keep_on_device", watch_kept),
        mock.patch.object(StreamedStore, "_pack", watch_hosted),
    ):
        with pytest.raises(UserError, match=r"the frozen blocks that stream need .* parallel.offload=auto"):
            filled(config, "frozen")
        train_module = filled(config, "auto")
        assert run_steps(train_module) == expected
    for (name, tensor), other in zip(weights(train_module).items(), weights(resident).values()):
        assert torch.equal(tensor, other), name
    return kept, hosted


@pytest.mark.parametrize(
    "ends", [pytest.param([], id="ends train"), pytest.param(FROZEN_ENDS, marks=pytest.mark.soak, id="ends frozen")]
)
def test_what_stays_on_the_device_needs_no_host_memory(ends: list[str]) -> None:
    config = configured(["method=lisa", *ends], BF16, "llama", num_hidden_layers=9)
    limit = 2 + (2685 if ends else 2900) * KIB
    config.parallel = dataclasses.replace(config.parallel, memory_limit=limit, activation_checkpointing="full")
    free = 6 * 50 * 2**10  # of nine blocks of about 48 KiB
    kept, hosted = run_on_ranks(1, train_beside_a_small_host, config, free)[0]
    assert 0 < max(hosted) <= free
    assert len(kept) == 4, "what surely fits, and the draws"
    assert all(len(before ^ after) <= 4 for before, after in itertools.pairwise(kept)), "two leave and two enter"
    config.parallel = dataclasses.replace(config.parallel, offload="auto")
    assert simulate(config).peaks[SWITCH] <= (limit - 2) * GIB


def test_the_plan_of_a_limit_keeps_it_and_copies_what_a_rank_does() -> None:
    config = configured(["sampler=fixed", "sampler.blocks=[5]"], {}, "llama", num_hidden_layers=7)
    limit, every = 2.006, {"offload": "frozen", "prefetch": 1}
    config.train = dataclasses.replace(config.train, global_batch_size=2, micro_batch_size=1)
    frozen = simulate(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **every))).host_bytes
    config.parallel = dataclasses.replace(config.parallel, offload="auto", memory_limit=limit, prefetch=1)
    planned = simulate(config)
    assert 0 < planned.host_bytes < frozen
    assert planned.peak_bytes <= (limit - 2) * GIB
    assert planned.work.link_bytes == run_on_ranks(1, copied_in_steps, config)[0][1]
