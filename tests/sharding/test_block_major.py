"""All micro-batches of a step through one block at a time: the numbers of the usual order, and what travels.

The link delivers late and spoils a slot when it is handed back, so that a race shows as numbers that are none.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3nTextConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.config import Config, UserError
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.method.module import TrainModule, begin_period
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime.units import GIB
from lisa_dist.sharding import streamed
from lisa_dist.sharding.block_major import accumulate, check_block_major
from lisa_dist.sharding.streamed import StreamedStore
from lisa_dist.sharding.waiting_states import UNDER_WAY, StatesOnDevice, StatesOnHost
from lisa_dist.training.step import dry_run_batch, train_step
from tests.support.families import tiny_config
from tests.support.planned import make_config as make_planned
from tests.support.planned import measure
from tests.support.ranks import run_on_ranks
from tests.support.simulated_link import SimulatedLink
from tests.support.small_training import ROUNDED, build_and_load, make_global_batches
from tests.support.streamed_training import BF16, CPU, FROZEN_ENDS, TIED, configured, filled, run_steps, weights

WIDE = {"hidden_size": 48}  # of which a tiny copy can be made
FIXED = ["sampler=fixed", "sampler.blocks=[3]"]  # of five blocks


def trainable(
    config: Config,
    block_major: bool,
    slots: int = 2,
    size: int = 2,
    offload: str = "frozen",
    offload_activations: bool = False,
) -> TrainModule:
    """A training of ``size`` micro-batches a step, over a link whose faults show."""
    config = copy.deepcopy(config)
    config.train = dataclasses.replace(config.train, global_batch_size=size, micro_batch_size=1)
    with mock.patch.object(streamed, "link_to", lambda device: SimulatedLink()):
        keys = {"block_major": block_major, "offload_activations": offload_activations}
        return filled(config, offload, slots, **keys)


def train_in_each_order(config: Config, slots: int, exact: bool, offload_activations: bool = False) -> None:
    """Compare losses, weights and what samplers saw of the orders, over three periods. Runs on one rank."""
    usual = trainable(config, False, slots)
    together = trainable(config, True, slots, offload_activations=offload_activations)
    expected, losses = run_steps(usual), run_steps(together)
    assert losses == (expected if exact else pytest.approx(expected, rel=1e-5))
    assert (together.sampler.scores() or []) == pytest.approx(usual.sampler.scores() or [], rel=1e-4)
    kept = weights(usual)
    for name, tensor in weights(together).items():
        if exact:
            assert torch.equal(tensor, kept[name]), name
        else:
            torch.testing.assert_close(tensor, kept[name], rtol=ROUNDED, atol=ROUNDED * float(kept[name].abs().max()))


@pytest.mark.parametrize(
    ("overrides", "precision", "family", "architecture", "slots"),
    [
        pytest.param(["method=lisa"], BF16, "llama", WIDE, 2, id="lisa"),
        pytest.param(["method=lisa", *FROZEN_ENDS], {}, "llama", WIDE, 1, id="lisa, frozen ends, one slot"),
        pytest.param(["method=lora", *FROZEN_ENDS], BF16, "llama", WIDE | TIED, 3, id="lora, frozen ends, tied"),
        pytest.param(["method=lora"], {}, "gpt_neox", {}, 2, id="lora"),
        pytest.param(
            ["method=lora", "model.quantization=nf4", *FROZEN_ENDS],
            BF16,
            "llama",
            {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
            2,
            id="lora, nf4",
        ),
        pytest.param(
            ["sampler.active_layers=0", "always_active.embeddings=false"], BF16, "llama", WIDE, 2, id="norm and head"
        ),
        pytest.param(["method=grass"], BF16, "llama", WIDE, 2, id="grass"),
        pytest.param(["method=ist"], {}, "llama", WIDE, 2, id="ist"),
        pytest.param(["method=lisa"], BF16, "qwen2_moe", {"mlp_only_layers": [0]}, 2, id="qwen2_moe"),
        pytest.param(["method=lisa", *FROZEN_ENDS], BF16, "gemma3", {}, 2, id="gemma3, frozen ends"),
        pytest.param(["method=lisa", "data.packing=true"], {}, "llama", WIDE, 2, id="packed"),
    ],
)
def test_training_is_that_of_the_usual_order(
    overrides: list[str], precision: dict[str, str], family: str, architecture: dict[str, Any], slots: int
) -> None:
    run_on_ranks(1, train_in_each_order, configured(overrides, precision, family, **architecture), slots, True)


@pytest.mark.parametrize(
    ("overrides", "family", "architecture"),
    [
        pytest.param(["method=lisa"], "llama", WIDE, id="lisa"),
        pytest.param(["method=lisa", *FROZEN_ENDS, "data.packing=true"], "llama", WIDE, id="frozen ends, packed"),
        pytest.param(["method=lora"], "gpt_neox", {}, id="lora"),
        pytest.param(["method=lora", *FROZEN_ENDS], "llama", WIDE | TIED, id="lora, frozen ends, tied"),
    ],
)
def test_training_is_the_same_where_inputs_of_blocks_wait_in_host_memory(
    overrides: list[str], family: str, architecture: dict[str, Any]
) -> None:
    run_on_ranks(1, train_in_each_order, configured(overrides, BF16, family, **architecture), 2, True, True)


def test_tied_weights_that_train_differ_by_the_order_of_sums_alone() -> None:
    """Their gradient is the head's of all micro-batches, then the embeddings' of all, instead of both of each."""
    config = configured(["method=lisa"], {}, "llama", **WIDE, **TIED)
    run_on_ranks(1, train_in_each_order, config, 2, False)


def journey(ends: list[str], size: int, width: int = 48) -> tuple[list[str], int, int]:
    """What happens to which block in a second step; its copied bytes, and those in the usual order. On one rank."""
    config, batches, copied = (
        configured([*FIXED, *ends], {}, "llama", hidden_size=width),
        make_global_batches(2, size),
        [],
    )
    for block_major in (False, True):
        train_module = trainable(config, block_major, size=size)
        begin_period(train_module, 0)
        train_step(train_module, batches[0], 0, 2)
        store = train_module.store
        assert isinstance(store, StreamedStore) and isinstance(store.link, SimulatedLink)
        store.link.timeline.clear()
        copied.append(train_step(train_module, batches[1], 1, 2).link_bytes)
    return [f"{kind} {block}" for kind, block, _ in store.link.timeline], copied[1], copied[0]


def test_a_block_travels_once_a_step_and_is_handed_back_after_the_last_micro_batch() -> None:
    timeline, copied, usual = run_on_ranks(1, journey, [], 4)[0]
    upwards = ["use 0", "done 0", "fetch 2", "use 1", "done 1", "fetch 4", "use 2", "done 2", "use 4", "done 4"]
    downwards = ["use 4", "done 4", "fetch 1", "use 2", "done 2", "fetch 0", "use 1", "done 1", "use 0", "done 0"]
    assert timeline == upwards + downwards
    assert 4 * copied == usual > 0


def test_blocks_that_no_gradient_reaches_are_visited_upwards_alone() -> None:
    timeline, copied, usual = run_on_ranks(1, journey, FROZEN_ENDS, 3)[0]
    assert [event for event in timeline if event[0] == "u"] == ["use 0", "use 1", "use 2", "use 4", "use 4"]
    assert 3 * copied == usual > 0


def test_one_micro_batch_a_step_is_the_usual_order() -> None:
    timeline, copied, usual = run_on_ranks(1, journey, [], 1)[0]
    assert timeline.count("use 4") == 2 and copied == usual


def resume_in_the_other_order(directory: Path) -> None:
    """Save at every step in one order, and go on from it in the other. Runs on one rank."""
    config = configured(["method=lisa"], BF16, "llama", **WIDE)
    config.checkpoint = load(["checkpoint.keep=0", "checkpoint.async=true"]).checkpoint
    expected = None
    for block_major in (False, True):
        train_module, path = trainable(config, block_major), directory / str(block_major)
        saver = CheckpointSaver(train_module, path, to_yaml(config))
        run_steps(train_module, saver=saver)
        saver.finish(stop_on_error=True)
        expected = expected or weights(train_module)
        again = trainable(config, not block_major)
        restore_checkpoint(again, path / checkpoint_name(3), CPU, data={})
        run_steps(again, 3)
        for name, tensor in weights(again).items():
            assert torch.equal(tensor, expected[name]), (block_major, name)


def test_checkpoints_go_from_one_order_to_the_other(tmp_path: Path) -> None:
    run_on_ranks(1, resume_in_the_other_order, tmp_path)


def resume_with_dropout(directory: Path) -> None:
    """Go on from a checkpoint with the same draws as if there had been none. Runs on one rank."""
    config = configured(["method=lisa"], {}, "gpt2", resid_pdrop=0.2, embd_pdrop=0.1)
    config.checkpoint = load(["checkpoint.keep=0"]).checkpoint
    train_module, again = (trainable(config, block_major=True) for _ in range(2))
    losses = run_steps(train_module, saver=CheckpointSaver(train_module, directory, to_yaml(config)))
    restore_checkpoint(again, directory / checkpoint_name(4), CPU, data={})
    assert run_steps(again, 4) == losses[-3:]
    for name, tensor in weights(train_module).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_dropout_after_a_resume_is_that_of_the_step(tmp_path: Path) -> None:
    run_on_ranks(1, resume_with_dropout, tmp_path)


def test_dropout_is_keyed_by_step_micro_batch_and_block() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", resid_pdrop=0.2, embd_pdrop=0.2)).train()
    blocks, ids = list(model.transformer.h), [torch.randint(0, 128, (2, size)) for size in (9, 5, 7)]

    def loss_of(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        return model(input_ids=tokens, labels=tokens).loss, 2.0

    def drawing_for(seed: int, micro_batch: int, block: int) -> Any:
        return lambda *_: torch.manual_seed(hash((seed, micro_batch, block)) % 2**63) and None

    found, losses = {}, {}
    for seed in (1, 2):
        expected_losses, divisor = [], 0.0
        for micro_batch, tokens in enumerate(ids):
            drawing_for(seed, micro_batch, -1)()
            hooks = [
                block.register_forward_pre_hook(drawing_for(seed, micro_batch, index))
                for index, block in enumerate(blocks)
            ]
            loss, counted = loss_of(tokens)
            loss.backward()
            for hook in hooks:
                hook.remove()
            expected_losses.append(float(loss.detach()))
            divisor += counted
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        passes = [functools.partial(loss_of, tokens) for tokens in ids]
        visits = lambda block: nullcontext(blocks[block].forward)  # noqa: E731
        found[seed], total = accumulate(passes, blocks, visits, 0, StatesOnDevice(), seed)
        losses[seed] = [float(loss) for loss in found[seed]]
        assert losses[seed] == expected_losses and total == divisor
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        model.zero_grad()
    assert losses[1] != losses[2]


def refusal(architecture: Any, blocks_path: str) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    with pytest.raises(UserError) as refused:
        check_block_major(model, blocks_path)
    message = str(refused.value)
    assert message.startswith(f"parallel.block_major=true: {type(model).__name__} ")
    assert message.endswith("; set parallel.block_major=false")
    return message


@pytest.mark.parametrize(
    ("architecture", "blocks_path", "reason"),
    [
        pytest.param(BloomConfig(), "transformer.h", "its blocks answer with more than the hidden states", id="tuples"),
        pytest.param(
            Gemma3nTextConfig(),
            "model.layers",
            "gradients pass into its blocks by more than the hidden states",
            id="inputs of each layer",
        ),
    ],
)
def test_families_that_can_not_are_refused_by_name(architecture: Any, blocks_path: str, reason: str) -> None:
    assert f"a tiny copy of it gives TypeError: {reason};" in refusal(architecture, blocks_path)


def test_blocks_that_share_what_they_have_computed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original, shared = LlamaDecoderLayer.forward, {}

    def forward(block: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = original(block, hidden_states, *args, **kwargs) + shared.get("keys", 0.0)
        shared["keys"] = hidden_states.mean(1, keepdim=True)
        if block.self_attn.layer_idx == block.self_attn.config.num_hidden_layers - 1:
            shared.clear()
        return result

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert "gets other losses or gradients, as of model." in refusal(LlamaConfig(num_hidden_layers=4), "model.layers")


def test_a_model_without_a_tiny_copy_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"UserError: parallel.block_major=true: LlamaForCausalLM can't be tried"):
        run_on_ranks(1, journey, [], 2, 54)  # of which a third is no size of a head for kernels


def bytes_of_two_steps(config: Config) -> list[int]:
    """The bytes that the first two steps of a period copy to the device. Runs on one rank."""
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    batches = make_global_batches(2, config.train.global_batch_size)
    return [train_step(train_module, batch, 0, 2).link_bytes for batch in batches]


def deep(ends: list[str], size: int, depth: int = 5, **parallel: Any) -> Config:
    """So many blocks, of which the last but one trains, in micro-batches of one sequence."""
    architecture = {"num_hidden_layers": depth, **WIDE}
    config = configured(["sampler=fixed", f"sampler.blocks=[{depth - 2}]", *ends], {}, "llama", **architecture)
    config.parallel = dataclasses.replace(config.parallel, offload="frozen", prefetch=1, block_major=True)
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    config.train = dataclasses.replace(config.train, global_batch_size=size, micro_batch_size=1)
    return config


@pytest.mark.parametrize(
    ("ends", "copies"),
    [pytest.param([], 4, marks=pytest.mark.soak, id="ends train"), pytest.param(FROZEN_ENDS, 4, id="ends frozen")],
)
def test_what_is_copied_in_a_step_is_planned(ends: list[str], copies: int) -> None:
    first, second = run_on_ranks(1, bytes_of_two_steps, deep(ends, 4))[0]
    assert first == second + 2 * (second // copies), "what a step begins with is there from the one before"
    planned = simulate(deep(ends, 4))
    usual = simulate(deep(ends, 4, block_major=False))
    assert planned.work.link_bytes == second == usual.work.link_bytes // 4
    assert planned.streamed[0].visits == usual.streamed[0].visits // 4 == 4


@pytest.mark.parametrize(
    ("ends", "size", "offload_activations"),
    [
        pytest.param([], 5, False, marks=pytest.mark.soak),
        pytest.param([], 7, True, marks=pytest.mark.soak),
        (FROZEN_ENDS, 7, True),
    ],
)
def test_each_micro_batch_more_adds_the_same_to_a_plan(ends: list[str], size: int, offload_activations: bool) -> None:
    config = deep(ends, size, offload_activations=offload_activations)
    assert simulate(config) == simulate(config, made=size)


@pytest.mark.parametrize(
    ("ends", "reached"),
    [pytest.param([], 5, marks=pytest.mark.soak, id="ends train"), pytest.param(FROZEN_ENDS, 2, id="ends frozen")],
)
def test_inputs_that_wait_in_host_memory_are_planned(ends: list[str], reached: int) -> None:
    size, state = 4, 1 * 128 * 48 * 4  # micro-batches, and bytes of what enters a block for one of them
    traces = []
    for offload_activations in (False, True):
        config = deep(ends, size, offload_activations=offload_activations)
        config.data.sequence_length = 128
        traces.append(simulate(config, made=size))
    device, host = traces
    assert (device.waiting_bytes, host.waiting_bytes) == (0, reached * size * state)
    assert host.work.link_bytes - device.work.link_bytes == reached * size * state
    assert host.persistent_bytes == device.persistent_bytes and host.host_bytes == device.host_bytes
    saved = device.peaks["forward of head"] - host.peaks["forward of head"]
    assert saved == state * (reached * size - UNDER_WAY), "all but the last, which are still on their way"


def copied_by_a_step(config: Config, offload_activations: bool) -> tuple[int, int, int]:
    """Bytes that a second step copies to the device, and from it, and the step's tokens. Runs on one rank."""
    train_module = trainable(config, True, size=4, offload_activations=offload_activations)
    begin_period(train_module, 0)
    batches = make_global_batches(2, 4)
    train_step(train_module, batches[0], 0, 2)
    link: Any = train_module.store.link  # type: ignore[attr-defined]
    link.timeline.clear()
    result = train_step(train_module, batches[1], 1, 2)
    sent = sum(size for kind, _, size in link.timeline if kind == "send")
    return result.link_bytes, sent, sum(batch["input_ids"].numel() for batch in batches[1])


def test_an_input_travels_once_each_way() -> None:
    config = configured([*FIXED, *FROZEN_ENDS], BF16, "llama", **WIDE)
    weights_alone, none, _ = run_on_ranks(1, copied_by_a_step, config, False)[0]
    copied, sent, tokens = run_on_ranks(1, copied_by_a_step, config, True)[0]
    assert none == 0 and sent == 2 * tokens * 48 * 2, "blocks 3 and 4 are reached, in bfloat16"
    assert copied == weights_alone + sent


def test_states_lie_on_the_device_while_they_are_on_their_way() -> None:
    link = SimulatedLink()
    states = StatesOnHost(link, 4096)
    given = {(block, micro): torch.randn(1, 3 + micro, 8) for block in range(3) for micro in range(4)}
    alive: list[weakref.ref[torch.Tensor]] = []
    for place, state in given.items():
        there = state.clone()
        alive.append(weakref.ref(there))
        states.put(*place, there)
        del there
        assert sum(reference() is not None for reference in alive) <= UNDER_WAY
    assert states.host_bytes == 12 * 4096, "buffers of one size serve every step"
    for block in reversed(range(3)):
        for micro in range(4):
            assert torch.equal(states.take(block, micro), given[block, micro])
            fetched = sum(kind == "fetch" for kind, _, _ in link.timeline)
            used = sum(kind == "use" for kind, _, _ in link.timeline)
            assert fetched - used == min(UNDER_WAY, 12 - used)
    assert states.host_bytes == 0


def refused_for_want_of_host_memory() -> str:
    """What is said where weights fit into host memory and inputs beside them don't. Runs on one rank."""
    config = configured(["method=lisa"], BF16, "llama", **WIDE)
    train_module = trainable(config, True, offload_activations=True)
    weights_alone = sum(train_module.store.frozen_block_bytes().values())
    again = mock.patch.object(streamed, "free_host_bytes", lambda: weights_alone + 1000)
    with again, pytest.raises(UserError) as refused:
        trainable(config, True, offload_activations=True)
    return str(refused.value)


def test_too_little_host_memory_for_inputs_is_told_before_weights_are_read() -> None:
    message = run_on_ranks(1, refused_for_want_of_host_memory)[0]
    assert ", and the inputs of blocks " in message and "take parallel.offload_activations=false, a machine" in message


def test_the_plan_has_the_inputs_of_all_micro_batches() -> None:
    config = make_planned("llama", "lisa")
    config.model.architecture |= {"hidden_size": 80, "num_hidden_layers": 4}
    config.sampler.blocks = [2, 3]  # type: ignore[attr-defined]
    config.train.global_batch_size = 12
    config.parallel = dataclasses.replace(config.parallel, nproc_per_node="1", offload="frozen", block_major=True)
    counted, peak = run_on_ranks(1, measure, config)[0]
    planned = simulate(config)
    assert planned.persistent_bytes == counted
    assert planned.peak_bytes + planned.host_bytes == pytest.approx(peak, rel=0.05)  # a CPU has both in one memory
    more = simulate(dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=14)))
    inputs = 5 * 2 * 96 * 80 * 2  # of four blocks and of what follows: two sequences of 96 tokens, bfloat16
    assert more.peak_bytes - planned.peak_bytes == pytest.approx(inputs, rel=0.2)


def train_within(limit: float) -> tuple[list[int], list[float]]:
    """The blocks that are copied under a limit of memory in GiB, and the losses. Runs on one rank."""
    config = configured(["method=lisa"], BF16, "llama", **WIDE)
    config.parallel = dataclasses.replace(config.parallel, memory_limit=limit, activation_checkpointing="full")
    train_module = trainable(config, block_major=True, offload="auto")
    losses = run_steps(train_module)
    return [block for block in range(5) if train_module.store.recomputes(block)], losses


def test_as_many_blocks_stay_on_the_device_as_leave_room_for_the_inputs_of_all_micro_batches() -> None:
    (streaming, losses), (none, same) = (run_on_ranks(1, train_within, limit)[0] for limit in (2.00262, 2.02))
    assert len(streaming) in (1, 2) and none == [] and losses == same
    config = deep([], 4, depth=7, offload="auto", memory_limit=2.0073, activation_checkpointing="full")
    config.train.micro_batch_size = 2
    planned = simulate(config)
    # What a block's backward pass has for a while is no activation that is reckoned with, in the usual order neither.
    assert planned.peak_bytes == pytest.approx(0.0073 * GIB, rel=0.1)
    assert planned.streamed[0].visits == 4, "two of six stay"
    assert planned.work.link_bytes == run_on_ranks(1, bytes_of_two_steps, config)[0][1] > 0
    config.parallel.offload_activations = True
    assert simulate(config).streamed[0].visits == 0, "inputs in host memory leave room for the two others"


def bytes_of_a_dry_run(size: int) -> int:
    """How many micro-batches the first block has at a time in the dry run. Runs on one rank."""
    train_module = trainable(configured(["method=lisa"], {}, "llama", **WIDE), block_major=True, size=size)
    begin_period(train_module, 0)
    passes = mock.MagicMock(side_effect=train_module.objective)
    train_module.objective = passes
    dry_run_batch(train_module, make_global_batches(1, 1)[0][0])
    return passes.call_count


def test_the_dry_run_has_as_many_micro_batches_in_memory_as_a_step() -> None:
    assert run_on_ranks(1, bytes_of_a_dry_run, 3)[0] == 2 * 3, "each begins, and ends with its loss"
