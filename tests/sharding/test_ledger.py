"""The account of memory and work under fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
        ledger.scope = "thin product"
        product = torch.empty(30, 20) @ torch.empty(20, 10)
        ledger.scope = "product"
        torch.empty(4096, 4096) @ torch.empty(4096, 4096)
        ledger.scope = "product in place"
        torch.empty(4096, 4096).addmm_(torch.empty(4096, 4096), torch.empty(4096, 4096))
        ledger.scope = "attention"
        F.scaled_dot_product_attention(*(torch.empty(2, 3, 64, 16) for _ in range(3)), is_causal=True)
        ledger.scope = "rest"
        product.relu().t()  # a view moves nothing
    scopes = ("thin product", "product", "product in place", "attention", "rest")
    thin, full, added, attention, rest = (ledger.work[scope] for scope in scopes)
    assert thin.flops == thin.thin_flops == 2 * 30 * 20 * 10
    assert thin.thin_bytes == 4 * (30 * 20 + 20 * 10 + 30 * 10)
    assert (full.flops, full.thin_flops, full.thin_bytes) == (2 * 4096**3, 0, 0) and full.product_flops == full.flops
    assert (added.flops, added.other_bytes) == (full.flops, 0)
    assert attention.attention_flops == attention.flops == 2 * 2 * 2 * 3 * 64 * 64 * 16 // 2
    assert (rest.flops, rest.other_bytes) == (0, 2 * 4 * 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_with_the_experts_of_a_mixture_are_counted_both_ways(dtype: torch.dtype) -> None:
    """32 rows with 4 experts of 64 x 48: the product, the gradient of the rows and that of the experts."""
    with FakeTensorMode(), Ledger(1) as ledger:
        ledger.scope = "it"
        rows, experts = (torch.nn.Parameter(torch.empty(*shape, dtype=dtype)) for shape in ((32, 64), (4, 64, 48)))
        product = torch._grouped_mm(rows, experts, offs=torch.empty(4, dtype=torch.int32))
        product.backward(torch.empty_like(product))
    assert ledger.work["it"].flops == 3 * 2 * 32 * 64 * 48


@pytest.mark.parametrize(
    ("run", "passes"),
    [
        pytest.param(lambda a, b: a.add_(b), 3, id="in place"),
        pytest.param(lambda a, b: a.copy_(b), 2, id="a copy, which does not read where it goes"),
        pytest.param(lambda a, b: torch.add(a, b, out=a.new_empty(a.shape)), 3, id="into what is given"),
        pytest.param(lambda a, b: torch.zeros_like(a), 1, id="zeros"),
        pytest.param(
            lambda a, b: a[torch.empty(10, dtype=torch.int64)], 0.02, id="10 of 1000 rows, beside their places"
        ),
        pytest.param(lambda a, b: torch.ops.aten._unsafe_view(a, [8000]), 0, id="a view"),
        pytest.param(lambda a, b: torch._foreach_copy_([a], [b]), 2, id="a list of copies"),
    ],
)
def test_bytes_are_those_that_an_operator_reads_and_writes(run: Callable[..., Any], passes: float) -> None:
    with FakeTensorMode(), Ledger(1) as ledger:
        first, second = torch.empty(1000, 8), torch.empty(1000, 8)
        ledger.scope = "it"
        run(first, second)
    moved = ledger.work["it"].other_bytes if "it" in ledger.work else 0
    assert moved == pytest.approx(passes * first.nbytes, abs=1000)


def test_the_fused_optimizer_reads_four_numbers_of_a_parameter_and_writes_four() -> None:
    with FakeTensorMode(), Ledger(1) as ledger:
        parameter = torch.nn.Parameter(torch.empty(1000))
        parameter.grad = torch.empty(1000)
        ledger.scope = "step"
        torch.optim.AdamW([parameter], fused=True).step()
    assert ledger.work["step"].other_bytes == pytest.approx(8 * 4000 + 2 * 4000, rel=0.01)  # the moments begin at zero


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
