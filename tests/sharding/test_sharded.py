"""What FSDP2's store gathers in a step, and when: counted on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_dist.method.module import begin_period
from lisa_dist.runtime import distributed
from lisa_dist.training.step import accumulate_gradients
from tests.support.ranks import run_on_ranks
from tests.support.small_training import build_and_load, make_config, make_global_batches

BLOCKS = 4
FROZEN_OUTSIDE = {"embeddings": False, "norm": False, "head": False}


class Gathers(TorchDispatchMode):
    """Counts them, and notes how many were begun when a block's forward or backward pass begins."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.at_forward: list[int] = []
        self.at_backward: list[int] = []

    def watch(self, block: torch.nn.Module) -> list[Any]:
        """Have the hooks of FSDP2, which gather, come before ours."""

        def end(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.at_backward.append(self.count))

        begin = block.register_forward_pre_hook(lambda *_: self.at_forward.append(self.count))
        return [begin, block.register_forward_hook(end)]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator.namespace == "c10d" and operator.overloadpacket.__name__ == "_allgather_base_"
        return operator(*args, **(kwargs or {}))


def gathers_of_steps(prefetch: int, tied: bool, outside: dict[str, bool]) -> list[dict[str, Any]]:
    """What forward and backward passes of three periods gather. Runs on every rank."""
    config = make_config(parallel={"prefetch": prefetch}, always_active=outside)
    config.model.architecture |= {"num_hidden_layers": BLOCKS, "tie_word_embeddings": tied}
    train_module = build_and_load(config)
    batch = make_global_batches(1)[0][distributed.rank()]
    seen = []
    for period in range(3):
        begin_period(train_module, period)
        gathers = Gathers()
        hooks = [hook for block in train_module.store.layers.blocks for hook in gathers.watch(block)]
        with gathers:
            loss, _ = accumulate_gradients(train_module, [batch])
        for hook in hooks:
            hook.remove()
        gradients = train_module.optimizer.gradients()
        norms = {name: float(distributed.local_shard(gradient).norm()) for name, gradient in gradients.items()}
        train_module.optimizer.drop_gradients()
        lowest = 0 if outside.get("embeddings", True) else min(train_module.active.blocks)
        numbers = {"count": gathers.count, "forward": gathers.at_forward, "backward": gathers.at_backward}
        seen.append(numbers | {"lowest": lowest, "loss": float(loss), "norms": norms})
    return seen


@pytest.mark.parametrize(("tied", "outside"), [(False, {}), (True, {}), (False, FROZEN_OUTSIDE)])
def test_what_the_backward_pass_begins_with_is_gathered_once_and_nothing_in_vain(
    tied: bool, outside: dict[str, bool]
) -> None:
    forward = BLOCKS + (1 if tied else 3)
    for step in run_on_ranks(2, gathers_of_steps, 1, tied, outside)[0]:
        assert step["count"] == forward + BLOCKS - 1 - min(step["lowest"], BLOCKS - 1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_so_many_blocks_are_gathered_ahead_in_both_passes(prefetch: int) -> None:
    usual = run_on_ranks(2, gathers_of_steps, 1, False, FROZEN_OUTSIDE)[0]
    for step, same in zip(run_on_ranks(2, gathers_of_steps, prefetch, False, FROZEN_OUTSIDE)[0], usual):
        assert (step["loss"], step["norms"], step["count"]) == (same["loss"], same["norms"], same["count"])
        for depth, found in ((prefetch, step), (1, same)):
            # Embeddings come first; the last block gathers norm and head ahead, which then stay, as it does itself.
            ahead = [min(block + depth, BLOCKS - 1) + 2 + 2 * (block + depth >= BLOCKS) for block in range(BLOCKS)]
            assert found["forward"] == ahead
            downwards = range(BLOCKS - 1, found["lowest"] - 1, -1)
            gathered = [BLOCKS + 3 + BLOCKS - 1 - max(block - depth, found["lowest"]) for block in downwards]
            assert found["backward"] == gathered
