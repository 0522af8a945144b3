"""Which phase of a simulated step it is: what the ledger puts bytes and work down to, and what a step comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lisa_dist.config.placement import is_block_major
from lisa_dist.method.module import TrainModule, count_persistent_bytes
from lisa_dist.runtime import distributed
from lisa_dist.sharding.ledger import Ledger, Work, sum_of_work
from lisa_dist.sharding.waiting_states import WaitingStates

SWITCH = "switch of active blocks"
STREAMED_FORWARD = ", forward of frozen blocks"
STREAMED_BACKWARD = ", backward of frozen blocks"


class StepPhases:
    """The stopwatch that the step is given: tells the ledger which phase it is, and counts persistent bytes."""

    def __init__(self, train_module: TrainModule, ledger: Ledger) -> None:
        self.train_module = train_module
        self.ledger = ledger
        self.block_major = is_block_major(train_module.config.parallel, train_module.config.train)
        self.micro_batch = 0 if self.block_major else -1  # where they pass together there is one account
        self.part = ""
        self.persistent_bytes: dict[str, int] = {}
        self.host_bytes = self.waiting_bytes = 0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.part = part
        if part == "forward":
            self.micro_batch += not self.block_major
            self._enter(None)
        elif part == "optimizer":
            self.ledger.phase = self.ledger.scope = part
            self.host_bytes = self.move_to_host()
            self.persistent_bytes = count_persistent_bytes(self.train_module)
        before = self.train_module.store.link_bytes
        yield
        copied = self.train_module.store.link_bytes - before
        self.ledger.work.setdefault(self.ledger.scope, Work()).link_bytes += copied

    def watch_modules(self) -> None:
        """Set the phase as the forward and the backward pass enter each part of the model."""
        layers = self.train_module.store.layers
        if self.block_major:
            self._watch_visits()
        for index, block in enumerate([] if self.block_major else layers.blocks):
            self._watch(block, f"block {index} of {len(layers.blocks)}", index)
        for modules, name in ((layers.embeddings, "embeddings"), (layers.norm, "norm"), ([layers.head], "head")):
            for module in modules:
                self._watch(module, name)

    def _enter(self, block: int | None, streamed: str = "") -> None:
        """Put down what comes to this micro-batch, apart where it is the pass of a block that streams, or might.

        Where micro-batches pass together, of any block: copies go on beside those that train too.
        """
        self.ledger.scope = f"micro-batch {self.micro_batch}"
        if block is None:
            return
        recomputes = self.train_module.store.recomputes(block)
        if recomputes or self.block_major or block not in self.train_module.active.blocks:
            self.ledger.scope += streamed
            self.ledger.work.setdefault(self.ledger.scope, Work()).visits += recomputes

    def _watch_visits(self) -> None:
        """Set the phase at each visit to a block, of all micro-batches: stubs answer when the model calls it."""
        store = self.train_module.store
        visit, waiting_states, depth = store.visit, store.waiting_states, len(store.layers.blocks)

        @contextmanager
        def watched(block: int) -> Iterator[Callable[..., Any]]:
            self.ledger.phase = f"{self.part} of block {block} of {depth}"
            self._enter(block, STREAMED_FORWARD if self.part == "forward" else STREAMED_BACKWARD)
            with visit(block) as forward:
                yield forward
            self._enter(None)

        def watched_states() -> WaitingStates:
            states = waiting_states()
            put = states.put

            def watched_put(block: int, micro_batch: int, state: torch.Tensor) -> None:
                with self.ledger.allocating_on_host():
                    put(block, micro_batch, state)
                self.waiting_bytes = max(self.waiting_bytes, states.host_bytes)

            states.put = watched_put  # type: ignore[method-assign]
            return states

        store.visit, store.waiting_states = watched, watched_states  # type: ignore[method-assign]

    def _watch(self, module: nn.Module, name: str, block: int | None = None) -> None:
        def begin_forward(*_: Any) -> None:
            self.ledger.phase = f"forward of {name}"
            self._enter(block, STREAMED_FORWARD)

        def begin_backward(_: torch.Tensor) -> None:
            self.ledger.phase = f"backward of {name}"
            self._enter(block, STREAMED_BACKWARD)

        def end_forward(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad:
                tensor.register_hook(begin_backward)

        module.register_forward_pre_hook(begin_forward, prepend=True)  # before FSDP2 gathers
        module.register_forward_hook(end_forward)

    def move_to_host(self) -> int:
        """Take what the configuration keeps in host memory out of the ledger; return its bytes."""
        optimizer, store = self.train_module.optimizer, self.train_module.store
        tensors = [tensor for waiting in optimizer.offloaded.values() for tensor in waiting.tensors.values()]
        if self.train_module.config.parallel.offload == "all":
            tensors += optimizer.moment_tensors().values()
        hosted = [store.parameter(name) for name in store.names if store.on_host(name)]
        tensors += [parameter.detach() for parameter in hosted]
        tensors += [parameter.grad for parameter in hosted if parameter.grad is not None]
        local = {id(shard): shard for shard in map(distributed.local_shard, tensors)}
        self.ledger.to_host(local.values())
        return sum(shard.nbytes for shard in local.values())


def work_of_step(work: dict[str, Work], micro_batches: int, made: int) -> Work:
    """Return the work of a step of ``micro_batches``, its optimizer's too; see :func:`work_of_passes`."""
    passes = work_of_passes(work, micro_batches, made, ["", STREAMED_FORWARD, STREAMED_BACKWARD])
    return sum_of_work([passes, work["optimizer"]], [1, 1])


def work_of_passes(work: dict[str, Work], micro_batches: int, made: int, parts: list[str]) -> Work:
    """Return the work of these parts of ``micro_batches``, of which those left out are like the second.

    Args:
        work: by scope.
        micro_batches: of a step.
        made: how many of them were simulated.
        parts: what follows the micro-batch in a scope's name.
    """
    found = []
    for index in range(made):
        of_parts = [work.get(f"micro-batch {index}{part}", Work()) for part in parts]
        found.append(sum_of_work(of_parts, [1] * len(of_parts)))
    return sum_of_work([*found, found[min(1, made - 1)]], [*([1] * made), micro_batches - made])
