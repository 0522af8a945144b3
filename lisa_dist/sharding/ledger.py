"""Keeps account of a step under fake tensors: what it allocates, computes, moves and sends, operator by operator.

A tracker that books whatever is allocated overstates the optimizer step. The first time that DTensor meets an operator
it infers the result's shape by running it on fake tensors of the *unsharded* shapes, and the fused AdamW takes all
parameters, gradients and moments at once: 16 bytes for each active parameter, not divided by the ranks. Here nothing
is booked while shapes are inferred.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
}
OPERATIONS_WITHOUT_TRAFFIC = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "resize_", "wait_tensor"}
OPERATIONS_WITHOUT_TRAFFIC.add("_unsafe_view")  # which is one, though torch does not say so
UNREAD = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "zeros_like", "ones_like", "full_like"}
INDEXED = {"embedding", "gather", "index", "index_select"}  # that need few entries of their first argument
IN_PLACE = {aten.addmm_: aten.addmm}  # torch knows the operations of the second alone
THIN = 256  # operations a byte below which a product waits for memory, on most GPUs of conf/gpu


@dataclass
class Work:
    """What a rank does in some scope of a step."""

    flops: int = 0  # of matrix products and attention
    attention_flops: int = 0  # of these, of attention in one operator
    thin_flops: int = 0  # of these, of products of fewer than THIN operations a byte, such as those with adapters
    thin_bytes: int = 0  # read and written by thin products
    other_bytes: int = 0  # read and written by what is neither a product nor attention
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # bytes that leave the rank, by collective
    sent_within_nodes: int = 0  # by collectives among the ranks of one machine
    sent_across_nodes: int = 0
    link_bytes: int = 0  # of weights that are copied from host memory, where the store itself copies them
    visits: int = 0  # passes of blocks that are copied for them

    @property
    def product_flops(self) -> int:
        """Of matrix products that wait for no memory."""
        return self.flops - self.attention_flops - self.thin_flops


COUNTED = tuple(field.name for field in fields(Work) if field.name != "sent")


def sum_of_work(parts: Sequence[Work], times: Sequence[int]) -> Work:
    """Return the sum of each part taken so many times, which may be negative."""
    total = Work()
    for part, count in zip(parts, times):
        for name in COUNTED:
            setattr(total, name, getattr(total, name) + count * getattr(part, name))
        for collective, size in part.sent.items():
            total.sent[collective] += count * size
    return total


def between(less: Work, more: Work, share: float) -> Work:
    """Return the work at ``share`` of the way from one to another, in whole numbers."""

    def at(first: int, second: int) -> int:
        return round(first + share * (second - first))

    found = Work(sent={collective: at(less.sent[collective], size) for collective, size in more.sent.items()})
    for name in COUNTED:
        setattr(found, name, at(getattr(less, name), getattr(more, name)))
    return found


class Ledger(TorchDispatchMode):
    """A dispatch mode to be entered after ``FakeTensorMode``.

    A tensor's value is not known: ``.item()`` gives True, 1.0 or 0 (the places of rank 0's shards).

    Attributes:
        phase: the name of what happens now, to be set from outside.
        scope: the name of the scope of the step to which work is put down, to be set from outside.
        live_bytes: bytes of all storages that are alive in device memory.
        peaks: the most bytes alive at once, by phase.
        work: what was done, by scope.
    """

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.phase = self.scope = "start"
        self.live_bytes = 0
        self.peaks: dict[str, int] = {}
        self.work: dict[str, Work] = {}
        self._live: dict[int, tuple[Any, int]] = {}  # a storage's address -> (weak reference, bytes)
        self._host: set[int] = set()  # addresses of storages that lie in host memory
        self._infers_shapes = self._allocates_on_host = False
        self._patches = ExitStack()

    def __enter__(self) -> Ledger:
        self._patches.enter_context(self._resizes_counted())
        self._patches.enter_context(self._shape_inference_left_out())
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    @contextmanager
    def _resizes_counted(self) -> Iterator[None]:
        # FSDP2 frees gathered parameters by resizing their storage, which is no operator.
        resize = torch.UntypedStorage.resize_

        def counted_resize(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._book(storage, only_known=True)
            return result

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    @contextmanager
    def _shape_inference_left_out(self) -> Iterator[None]:
        infer = ShardingPropagator._propagate_tensor_meta_non_cached

        def uncounted_infer(propagator: ShardingPropagator, *args: Any, **kwargs: Any) -> Any:
            before, self._infers_shapes = self._infers_shapes, True
            try:
                return infer(propagator, *args, **kwargs)
            finally:
                self._infers_shapes = before

        ShardingPropagator._propagate_tensor_meta_non_cached = uncounted_infer  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            ShardingPropagator._propagate_tensor_meta_non_cached = infer  # type: ignore[method-assign]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.prim.device.default:  # two of three calls in a simulated step
            return _device_of(args[0])
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # a DTensor's operators, or another wrapper's, on what it holds come here again
        if operator is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        kwargs = kwargs or {}
        unknown = operator is aten._grouped_mm.default and args[0].dtype != torch.bfloat16
        result = _result_of_groups(*args, **kwargs) if unknown else operator(*args, **kwargs)
        if self._infers_shapes:
            return result
        for tensor in _tensors(result):
            if _device_of(tensor).type != "meta":
                self._book(tensor.untyped_storage())
        self._record(operator, args, kwargs, result)
        return result

    @contextmanager
    def allocating_on_host(self) -> Iterator[None]:
        """Count no storage that is made while the context lasts: it lies in host memory."""
        self._allocates_on_host = True
        try:
            yield
        finally:
            self._allocates_on_host = False

    def to_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these tensors' storages no longer: they lie in host memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._live and address not in self._host:
                self._host.add(address)
                self.live_bytes -= self._live[address][1]

    def _book(self, storage: torch.UntypedStorage, only_known: bool = False) -> None:
        address, size = storage._cdata, storage.nbytes()
        known = self._live.get(address)
        if known is None and only_known:
            return
        if known is None:
            reference = weakref.ref(storage, lambda _: self._forget(address))
            self._live[address] = (reference, size)
            if self._allocates_on_host:
                self._host.add(address)
            else:
                self.live_bytes += size
        elif known[1] != size:
            self._live[address] = (known[0], size)
            if address not in self._host:
                self.live_bytes += size - known[1]
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live_bytes)

    def _forget(self, address: int) -> None:
        _, size = self._live.pop(address)
        if address in self._host:
            self._host.remove(address)
        else:
            self.live_bytes -= size

    def _record(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        work = self.work.setdefault(self.scope, Work())
        name = operator.overloadpacket.__name__
        if operator.namespace in ("c10d", "_c10d_functional"):
            if name in COLLECTIVES:
                self._record_collective(work, COLLECTIVES[name], args, result)
            return
        if operator.is_view or operator.namespace in ("prim", "profiler") or name in OPERATIONS_WITHOUT_TRAFFIC:
            return
        moved = _bytes_moved(operator, args, kwargs, result)
        flops = _flops(operator, args, kwargs, result)
        work.flops += flops
        if not flops:
            work.other_bytes += moved
        elif "attention" in name:
            work.attention_flops += flops
        elif flops < THIN * moved:
            work.thin_flops += flops
            work.thin_bytes += moved

    def _record_collective(self, work: Work, collective: str, args: Any, result: Any) -> None:
        ranks = _group_ranks(args)
        size = max(tensor.numel() * tensor.element_size() for tensor in _tensors((args, result)))
        # Of a ring: each rank passes on all parts but one; an all-reduce is a reduce-scatter and an all-gather.
        passes = 2 if collective == "all_reduce" else 1
        sent = passes * size * (len(ranks) - 1) // len(ranks)
        work.sent[collective] += sent
        if ranks[0] // self.ranks_per_node == ranks[-1] // self.ranks_per_node:
            work.sent_within_nodes += sent
        else:
            work.sent_across_nodes += sent


def _device_of(tensor: torch.Tensor) -> torch.device:
    """Return ``tensor.device``, of a fake tensor without the dispatch that its property takes."""
    if not isinstance(tensor, FakeTensor):
        return tensor.device
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


def _result_of_groups(first: torch.Tensor, second: torch.Tensor, offsets: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """Return a result for ``_grouped_mm``, of which torch infers those in bfloat16 alone and computes others too."""
    groups = () if first.dim() != second.dim() else (len(first) if offsets is None else len(offsets),)
    return first.new_empty((*groups, first.shape[-2], second.shape[-1]))


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))


def _bytes_moved(operator: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes of what an operator reads and of what it writes: its result, or what it is given for that."""
    name, read, written = operator.overloadpacket.__name__, [], []
    for place, argument in enumerate(operator._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if place == 0 and name in INDEXED:
            continue
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(value)
        if not argument.is_out and not (place == 0 and name in UNREAD):
            read.append(value)
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors((read, written or result)))


def _group_ranks(args: Any) -> list[int]:
    """Return the global ranks of a collective operator's process group."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return sorted(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    name: Any = [argument for argument in args if isinstance(argument, str)][-1]
    return sorted(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name)))


def _flops(operator: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the operations of a matrix product or an attention, 0 for all else."""
    packet = IN_PLACE.get(operator.overloadpacket, operator.overloadpacket)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return 2 * _attention_products(args[0], args[1], args[2], kwargs.get("is_causal", len(args) > 4 and args[4]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Five products where the forward pass has two: it computes the scores again.
        return 5 * _attention_products(args[1], args[2], args[3], args[7])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if packet is aten._grouped_mm:  # of a mixture's experts, which torch does not count
        return 2 * _grouped_products(args[0].shape, args[1].shape)
    return 0


def _grouped_products(first: torch.Size, second: torch.Size) -> int:
    """Return the multiplications of a grouped product, of whose shapes one with two sizes is split among the groups."""
    return prod(second) * first[-2] if len(first) > len(second) else prod(first) * second[-1]


def _attention_products(query: Any, key: Any, value: Any, is_causal: bool) -> int:
    """Return the operations of one of attention's products; half of it is left out where attention is causal."""
    batch, heads, tokens, size = query.shape
    full = 2 * prod((batch, heads, tokens, key.shape[2], max(size, value.shape[3])))
    return full // 2 if is_causal else full
