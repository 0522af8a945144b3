"""The store of whole weights: FSDP2's numbers to the last bit, its bytes, and what travels between replicas."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_dist.checkpoint.manifest import checkpoint_name
from lisa_dist.checkpoint.restore import restore_checkpoint
from lisa_dist.checkpoint.save import CheckpointSaver
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config.loading import load, to_yaml
from lisa_dist.method.module import TrainModule, begin_period, build_train_module
from lisa_dist.models.layer_map import LayerMap
from lisa_dist.planning.simulation import simulate
from lisa_dist.runtime import distributed
from lisa_dist.runtime.distributed import local_shard
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.resident import ResidentStore
from lisa_dist.training.step import accumulate_gradients, train_step
from tests.support import planned
from tests.support.ranks import run_on_ranks
from tests.support.small_training import (
    PERIOD,
    ROUNDED,
    STEPS,
    build_and_load,
    make_config,
    make_global_batches,
    train_on_rank,
    train_reference,
)

CPU = torch.device("cpu")
SAVED, LAST = 3, 5  # steps: within the second period, and after the first of the third
BF16 = {"frozen": "bfloat16", "compute": "bfloat16"}
REPLICAS = {"replicate": 2}
LARGE = 16384  # bytes of a gradient, which a matrix of an MLP has and one of attention has not


def weights(train_module: TrainModule) -> dict[str, torch.Tensor]:
    return {name: local_shard(tensor).clone() for name, tensor in train_module.store.tensors().items()}


def run_steps(train_module: TrainModule, first: int, last: int, directory: Path | None = None) -> list[float]:
    """Make steps ``first`` up to ``last``, a checkpoint after step SAVED where there is a directory for it."""
    batches, losses = make_global_batches(STEPS), []
    for step in range(first, last):
        if step % PERIOD == 0:
            begin_period(train_module, step // PERIOD, lambda count: batches[0][:count])
        losses.append(train_step(train_module, batches[step], step, STEPS).loss)
        if directory is not None and step + 1 == SAVED:
            CheckpointSaver(train_module, directory, to_yaml(train_module.config)).save(Progress(step=SAVED))
    return losses


def drive(
    kind: str, method: str, precision: dict[str, str], tied: bool, directory: Path | None, other: Path | None
) -> dict[str, Any]:
    """In a store train and save in a directory, and go on from another's checkpoint. Runs on one rank."""
    config = make_config(precision=precision)
    config.model.architecture["num_hidden_layers"] = 3
    config.model.architecture["tie_word_embeddings"] = tied
    # Head and embeddings that train in bf16 would differ: FSDP2 has their gradients rounded to it, here they are not.
    frozen = [f"always_active.{part}=false" for part in ("embeddings", "head")] if precision == BF16 else []
    chosen = load([f"method={method}", *frozen])
    config.update, config.sampler, config.always_active = chosen.update, chosen.sampler, chosen.always_active
    config.sampler.period = PERIOD
    if method == "owlore":
        config.sampler.active_layers = 2
    with mock.patch("lisa_dist.sharding.stay_whole", lambda *_: kind == "resident"):
        result: dict[str, Any] = {}
        if directory is not None:
            train_module = build_and_load(config)
            losses = run_steps(train_module, 0, LAST, directory)
            plain = [not isinstance(tensor, DTensor) for tensor in train_module.optimizer.moment_tensors().values()]
            assert all(plain) if kind == "resident" else not any(plain)
            result |= {"losses": losses, "weights": weights(train_module)}
        if other is not None:
            again = build_train_module(config)
            restore_checkpoint(again, other / checkpoint_name(SAVED), CPU, data={})
            result |= {"resumed losses": run_steps(again, SAVED, LAST), "resumed weights": weights(again)}
        return result


@pytest.mark.parametrize(
    ("method", "precision", "tied"),
    [
        pytest.param("lisa", {}, False, id="lisa", marks=pytest.mark.soak),
        pytest.param("grass", {}, True, id="grass"),
        pytest.param("owlore", BF16, True, id="owlore"),
        pytest.param("lora", BF16, False, id="lora"),
    ],
)
def test_numbers_are_those_of_fsdp2_and_checkpoints_go_both_ways(
    method: str, precision: dict[str, str], tied: bool, tmp_path: Path
) -> None:
    one, other = tmp_path / "sharded", tmp_path / "resident"
    sharded = run_on_ranks(1, drive, "sharded", method, precision, tied, one, None)[0]
    resident = run_on_ranks(1, drive, "resident", method, precision, tied, other, one)[0]
    back = run_on_ranks(1, drive, "sharded", method, precision, tied, None, other)[0]
    assert resident["losses"] == sharded["losses"] and len(set(sharded["losses"])) == LAST
    assert resident["resumed losses"] == back["resumed losses"] == sharded["losses"][SAVED:]
    for name, expected in sharded["weights"].items():
        for found in (resident["weights"], resident["resumed weights"], back["resumed weights"]):
            assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name


def test_two_replicas_equal_plain_pytorch_and_each_other() -> None:
    config = make_config(parallel=REPLICAS)
    first, second = run_on_ranks(2, train_on_rank, config)
    reference, losses = train_reference(config, first["initial"], first["draws"])
    assert first["losses"] == pytest.approx(losses, rel=1e-5) and second["losses"] == first["losses"]
    for name, parameter in first["final"].items():
        assert (parameter - reference[name]).norm() < ROUNDED * reference[name].norm(), name
        assert torch.equal(parameter, second["final"][name]), name


def test_replicas_in_bf16_stay_equal_and_follow_two_shards() -> None:
    shards = run_on_ranks(2, train_on_rank, make_config(precision=BF16), 4)[0]
    first, second = run_on_ranks(2, train_on_rank, make_config(precision=BF16, parallel=REPLICAS), 4)
    assert first["losses"] == pytest.approx(shards["losses"], rel=1e-3)
    assert all(torch.equal(parameter, second["final"][name]) for name, parameter in first["final"].items())


def error_of_a_frequent_token(kind: str) -> float:
    """By how much the gradient of a token that fills the batch misses the sum over its places. Runs on one rank."""
    with mock.patch("lisa_dist.sharding.stay_whole", lambda *_: kind == "resident"):
        train_module = build_and_load(make_config(precision=BF16))
        incoming: list[torch.Tensor] = []
        embeddings = train_module.store.layers.embeddings[0]
        embeddings.register_forward_hook(lambda module, args, rows: rows.register_hook(incoming.append) and None)
        labels = torch.arange(8 * 64).view(8, 64) % 127
        batch = {
            "input_ids": torch.full_like(labels, 7),
            "labels": labels,
            "position_ids": torch.arange(64).expand(8, 64),
        }
        accumulate_gradients(train_module, [batch])
        expected = incoming[0].double().sum((0, 1))
        found = local_shard(train_module.optimizer.gradients()["model.embed_tokens.weight"])[7]
        return float((found - expected).norm() / expected.norm())


def head_gradient(tied: bool) -> torch.Tensor:
    """The gradient of a head in bf16 whose master is in fp32, a sum of many products. Runs on one rank."""
    config = make_config(precision=BF16, model={"loss_chunk": "2"})
    config.model.architecture["tie_word_embeddings"] = tied
    train_module = build_and_load(config)
    ids = torch.arange(64)[None] % 127
    accumulate_gradients(train_module, [{"input_ids": ids, "labels": ids, "position_ids": torch.arange(64)[None]}])
    return train_module.optimizer.gradients()["model.embed_tokens.weight" if tied else "lm_head.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_of_the_head_reaches_its_master_unrounded(tied: bool) -> None:
    gradient = run_on_ranks(1, head_gradient, tied)[0]
    assert gradient.dtype == torch.float32
    assert (gradient != gradient.bfloat16().float()).float().mean() > 0.9


def gradients_of_two_micro_batches(in_place: bool) -> dict[str, Any]:
    """The head's gradient after a step's micro-batches, where it lay after the first, and a scaled loss. On a rank."""
    train_module = build_and_load(make_config(precision=BF16))
    begin_period(train_module, 0)
    store, name = cast(ResidentStore, train_module.store), "lm_head.weight"
    if in_place:  # as on a GPU
        cast(Any, store.parameter(name)).take_gradient = partial(store._give_gradient, name)
    micro_batches = make_global_batches(1)[0][:2]
    accumulate_gradients(train_module, micro_batches[:1])
    first = cast(torch.Tensor, store.master(name).grad).data_ptr()
    accumulate_gradients(train_module, micro_batches[1:])
    second = cast(torch.Tensor, store.master(name).grad)
    found = {"stayed": second.data_ptr() == first, "gradient": second.clone()}
    if in_place:
        loss, _ = train_module.objective(store.module, micro_batches[0])
        with pytest.raises(RuntimeError, match="not to be scaled"):
            (loss * 0.5).backward()
    return found


def test_the_gradient_of_the_head_is_added_to_that_of_earlier_micro_batches_where_it_lies() -> None:
    (apart,), (in_place,) = (run_on_ranks(1, gradients_of_two_micro_batches, each) for each in (False, True))
    assert in_place["stayed"]
    torch.testing.assert_close(in_place["gradient"], apart["gradient"], rtol=1e-5, atol=1e-6)
    assert apart["gradient"].abs().sum() > 0


def test_the_gradient_of_embeddings_is_summed_in_fp32() -> None:
    assert run_on_ranks(1, error_of_a_frequent_token, "resident")[0] < 1e-5
    assert run_on_ranks(1, error_of_a_frequent_token, "sharded")[0] > 1e-3, "in bf16, by FSDP2"


def scaled_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a scaled embedding that trains in bf16, and those of transformers. Runs on one rank."""
    config = make_config(precision=BF16)
    config.model.architecture |= {"model_type": "gemma3_text", "tie_word_embeddings": False, "head_dim": 18}
    train_module = build_and_load(config)
    begin_period(train_module, 0)
    ours = cast(nn.Embedding, train_module.store.layers.embeddings[0])
    theirs = copy.deepcopy(ours).bfloat16()
    theirs._forward_hooks.clear()
    ids = torch.arange(ours.num_embeddings)
    return ours(ids).detach(), theirs(ids).detach()


def test_an_embedding_that_scales_its_rows_does_so_in_the_dtype_of_the_arithmetic() -> None:
    ours, theirs = run_on_ranks(1, scaled_rows)[0]
    assert torch.equal(ours, theirs)


class Collectives(TorchDispatchMode):
    """Counts them by name, and notes how many gradients there were as each was begun."""

    def __init__(self, masters: Iterable[torch.nn.Parameter]) -> None:
        super().__init__()
        self.masters = list(masters)
        self.counts: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.gradients: list[int] = []
        self.storages = 0  # that the gradients have in the end

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            self.counts[operator.overloadpacket.__name__] += 1
            self.sizes.append(sum(tensor.nbytes for tensor in args[0]))
            self.gradients.append(sum(master.grad is not None for master in self.masters))
        return operator(*args, **(kwargs or {}))


def traffic_of_a_step(micro_batches: int, bucket_bytes: int) -> Collectives:
    """What the forward and backward passes of a step send. Runs on every rank."""
    train_module = build_and_load(make_config(precision=BF16, parallel=REPLICAS))
    begin_period(train_module, 0)
    batches = make_global_batches(1, 2 * micro_batches)[0][distributed.rank() :: 2]
    with (
        mock.patch("lisa_dist.sharding.replicas.BUCKET_BYTES", bucket_bytes),
        Collectives(train_module.optimizer.parameters.values()) as seen,
    ):
        accumulate_gradients(train_module, batches)
    gradients = train_module.optimizer.gradients().values()
    seen.storages = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
    return seen


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_between_replicas_only_gradients_of_what_trains_travel_once_a_step(micro_batches: int) -> None:
    for seen in run_on_ranks(2, traffic_of_a_step, micro_batches, 0):
        assert seen.counts == {"allreduce_": len(seen.masters)}
        assert sorted(seen.sizes) == sorted(4 * master.numel() for master in seen.masters)
        if micro_batches == 1:  # they are sent while the backward pass goes on, a block's before the next block's
            assert seen.gradients[0] == 1 and seen.gradients[len(seen.masters) // 2] < len(seen.masters)


def test_small_gradients_travel_together_and_large_ones_alone() -> None:
    for seen in run_on_ranks(2, traffic_of_a_step, 1, LARGE):
        gradients = [4 * master.numel() for master in seen.masters]
        large = [size for size in gradients if size >= LARGE]
        small = sum(gradients) - sum(large)
        assert large and small > 2 * LARGE, "the model has both"
        assert seen.counts == {"allreduce_": len(seen.sizes)} and sum(seen.sizes) == sum(gradients)
        assert max(seen.sizes) == max(large) and len(seen.sizes) <= len(large) + small // LARGE + 1
        assert seen.gradients[0] < len(seen.masters), "the first leave before the last have come"
        assert seen.storages == len(seen.sizes), "they stay where they were summed: nothing is held twice"


class Experts(nn.Module):
    """Two layers, each of which only some inputs are sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)

    def forward(self, expert: str) -> torch.Tensor:
        return getattr(self, expert)(torch.ones(3)).sum()


def replica_of_experts(trained: bool) -> tuple[Experts, ResidentStore]:
    module = Experts()
    config = make_config(parallel=REPLICAS)
    mesh = ParallelDims.of(config.parallel).mesh
    store = ResidentStore(module, cast(LayerMap, None), mesh, config.precision, lambda name: False)
    store.set_trainable(store.names, trained=trained)
    return module, store


def gradients_of_experts(sent_to: list[list[str]]) -> list[float]:
    """The sums of the experts' gradients after the micro-batches that this rank sends to them. Runs on every rank."""
    module, store = replica_of_experts(trained=True)
    experts = sent_to[distributed.rank()]
    for index, expert in enumerate(experts):
        store.defer_reduction(index < len(experts) - 1)
        module(expert).backward()
    return [float(store.master(name).grad.sum()) for name in store.names]


def test_experts_that_a_replica_sends_nothing_to_get_the_gradients_of_the_others() -> None:
    assert run_on_ranks(2, gradients_of_experts, [["first"], ["second"]]) == [[3, 3]] * 2


def test_gradients_of_earlier_micro_batches_are_summed_where_the_last_brings_none() -> None:
    sent_to = [["first", "second"], ["first", "first"]]
    assert run_on_ranks(2, gradients_of_experts, sent_to) == [[9, 3]] * 2


def gradients_of_frozen_experts(sent_to: list[str]) -> dict[str, float]:
    """The sums of the experts' gradients that a probe is shown, where this rank sends to one. Runs on every rank."""
    module, store = replica_of_experts(trained=False)
    names, shown = {id(store.parameter(name)): name for name in store.names}, {}

    def show(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        shown[names[id(parameter)]] = float(parameter.grad.sum())
        parameter.grad = None

    with store.also_trained(store.names, show):
        module(sent_to[distributed.rank()]).backward()
    return shown


def test_a_probe_is_shown_each_experts_own_gradient_whatever_each_replica_sends_to() -> None:
    expected = {"first.weight": 3, "second.weight": 3}
    assert run_on_ranks(2, gradients_of_frozen_experts, ["first", "second"]) == [expected] * 2


@pytest.mark.parametrize(
    ("ranks", "setting"),
    [(1, "lisa"), pytest.param(1, "full, two micro-batches", marks=pytest.mark.soak), (2, "full, two micro-batches")],
)
def test_a_plan_knows_the_bytes(ranks: int, setting: str) -> None:
    config = planned.make_config("llama", setting)
    config.parallel.nproc_per_node, config.parallel.replicate = str(ranks), ranks
    counted, peak = run_on_ranks(ranks, planned.measure, config)[0]
    foretold = simulate(config)
    assert foretold.persistent_bytes == counted
    assert foretold.peak_bytes == pytest.approx(peak, rel=0.1)
    active, looked_up = counted["gradients"] // 4, planned.VOCABULARY * planned.HIDDEN
    assert sum(counted.values()) == counted["frozen_parameters"] + 18 * active - 2 * looked_up
    assert foretold.work.sent == ({} if ranks == 1 else {"all_reduce": 4 * active})
