"""The account of memory and work under fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_dist.planning.simulation import simulate
from lisa_dist.sharding.ledger import Ledger
from tests.support.planned import make_config


def test_a_storage_is_worth_its_bytes_as_long_as_it_lives() -> None:
    with FakeTensorMode(), Ledger(1) as ledger:
        ledger.phase = "first"
        kept = torch.empty(100)
        view = kept[10:]  # shares the storage
        gone = torch.empty(1000, dtype=torch.bfloat16)
        assert ledger.live_bytes == 400 + 2000
        del gone
        ledger.phase = "second"
        kept.untyped_storage().resize_(0)
        assert ledger.live_bytes == 0
        kept.untyped_storage().resize_(400)
        del kept
        assert ledger.live_bytes == 400 and view.shape == (90,)
        del view
    assert ledger.live_bytes == 0
    assert ledger.peaks == {"first": 2400, "second": 400}


def test_work_is_counted_operator_by_operator() -> None:
    with FakeTensorMode(), Ledger(1) as ledger:
        ledger.scope = "products"
        product = torch.empty(30, 20) @ torch.empty(20, 10)
        ledger.scope = "rest"
        product.relu().t()  # a view moves nothing
    assert ledger.work["products"].flops == 2 * 30 * 20 * 10
    assert ledger.work["products"].matrix_bytes == 4 * (30 * 20 + 20 * 10 + 30 * 10)
    assert (ledger.work["rest"].flops, ledger.work["rest"].other_bytes) == (0, 2 * 4 * 300)


def test_what_lies_in_host_memory_is_not_counted() -> None:
    with FakeTensorMode(), Ledger(1) as ledger:
        tensor = torch.empty(100)
        ledger.to_host([tensor])
        assert ledger.live_bytes == 0
        del tensor
        assert ledger.live_bytes == 0


def test_inferred_shapes_would_count_the_unsharded_state(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("llama", "lisa")
    config.model.architecture["intermediate_size"] = 203  # DTensor remembers what it inferred, so sizes of its own

    @contextmanager
    def unchanged(ledger: Ledger) -> Iterator[None]:
        yield

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_shape_inference_left_out", unchanged)
        naive = simulate(config)
    honest = simulate(config)
    trained = sum(honest.persistent_bytes[kind] for kind in ("active_parameters", "gradients", "optimizer_state"))
    # A rank of two holds half of it; shapes are inferred with the whole, one of the optimizer's groups (blocks,
    # embeddings, norm, head) at a time: here with all of the blocks that train, two thirds of what does.
    assert naive.peaks["optimizer"] - honest.peaks["optimizer"] > 2 * 0.6 * trained
    assert honest.peaks["optimizer"] < 1.1 * sum(honest.persistent_bytes.values())
