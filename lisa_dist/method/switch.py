"""The period's switch: one decision for all ranks, then freeze, thaw, and hand over to the optimizer.

This is the only place where a period changes what trains.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lisa_dist.config import AlwaysActiveConfig
from lisa_dist.config.sampling import ProbeRequest, SamplerConfig
from lisa_dist.method.optim.active_optimizer import ActiveOptimizer
from lisa_dist.method.sampling import Sampler
from lisa_dist.method.updates import Update
from lisa_dist.models.layer_map import LayerMap, block_of
from lisa_dist.runtime import distributed
from lisa_dist.sharding.store import ParameterStore

logger = logging.getLogger(__name__)


class DisagreementError(RuntimeError):
    """Ranks received different sets of active blocks."""


class RankSynchronizedSampler:
    """Wraps any sampler so that its draw is one decision: rank 0 draws, every rank receives and checks the set.

    The sampler's state lives on rank 0; the other ranks' copies are never asked.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def draw(self, period: int) -> list[int]:
        """Return the sorted blocks of ``period``, the same on every rank. Collective: every rank.

        Raises:
            DisagreementError: a rank received something else than rank 0 sent, or ranks hold different sets.
        """
        drawn = self.sampler.draw(period) if distributed.is_main() else None
        message = distributed.broadcast_object(None if drawn is None else (drawn, checksum(period, drawn)))
        assert message is not None, "rank 0 draws"
        blocks, sent = message
        verify_agreement(period, blocks, sent)
        return blocks

    def request(self, period: int) -> ProbeRequest | None:
        """Return what rank 0's sampler wants to know before the draw of ``period``. Collective: every rank."""
        if not self.sampler.wants_probe(period):
            return None
        return distributed.broadcast_object(self.sampler.request() if distributed.is_main() else None)

    def observe(self, scores: list[float]) -> None:
        """Hand scores, already reduced over ranks, to the sampler of rank 0."""
        if distributed.is_main():
            self.sampler.observe(scores)

    def observe_step(self, squares: Mapping[int, float]) -> None:
        """Hand what a step showed of its blocks, already reduced over ranks, to the sampler of rank 0."""
        if distributed.is_main():
            self.sampler.observe_step(squares)

    def scores(self) -> list[float] | None:
        """Return what the sampler knows of each block, for the record; meant for rank 0."""
        return self.sampler.scores()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of rank 0's sampler on every rank. Collective: every rank."""
        return distributed.broadcast_object(self.sampler.state_dict() if distributed.is_main() else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sampler's state."""
        self.sampler.load_state_dict(state)


def checksum(period: int, blocks: list[int]) -> int:
    """Return a checksum of a period's set of blocks."""
    return zlib.crc32(f"{period}:{blocks}".encode())


def verify_agreement(period: int, blocks: list[int], sent: int) -> None:
    """Raise :class:`DisagreementError` unless every rank holds the set that rank 0 sent. Collective: every rank."""
    held = distributed.gather_objects((blocks, checksum(period, blocks) == sent))
    if all(intact and other == held[0][0] for other, intact in held):
        return
    sets = [f"rank {rank}: {other}{'' if intact else ' (damaged)'}" for rank, (other, intact) in enumerate(held)]
    raise DisagreementError(f"ranks disagree on the active blocks of period {period}: {', '.join(sets)}")


@dataclass
class ActiveSet:
    """What trains now: what was drawn for the period, and the parameters outside the blocks that always train."""

    always: list[str]  # parameter names
    blocks: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # parts outside the blocks that were drawn
    period: int = -1  # none drawn yet

    @property
    def drawn(self) -> list[str]:
        """The parts that were drawn, as the layer map names them."""
        return parts_of(self.blocks, self.modules)


def parts_of(blocks: Iterable[int], modules: Iterable[str]) -> list[str]:
    """Return the names of parts: blocks, and those outside the blocks."""
    return [*(f"block:{block}" for block in blocks), *modules]


def drawable_modules(sampler: SamplerConfig, layers: LayerMap) -> list[str]:
    """Return the parts outside the blocks that are drawn among them; tied weights are one, named ``embeddings``."""
    if not sampler.draws_non_block_modules:
        return []
    return ["embeddings"] if layers.tied else ["embeddings", "head"]


def drawn_parts(drawn: list[int], num_blocks: int, modules: list[str]) -> tuple[list[int], list[str]]:
    """Return the blocks and the modules of a draw, whose indices behind the last block's are those of ``modules``."""
    blocks = [index for index in drawn if index < num_blocks]
    return blocks, [modules[index - num_blocks] for index in drawn if index >= num_blocks]


def always_active_parameters(store: ParameterStore, always_active: AlwaysActiveConfig) -> list[str]:
    """Return the names of the parameters outside the blocks that train in every period.

    Raises:
        UserError: tied weights would be both trained and frozen.
    """
    always_active.check_tied(store.layers.tied)
    trained = {"embeddings": always_active.embeddings, "norm": always_active.norm, "head": always_active.head}
    return [name for role, active in trained.items() if active for name in store.parameters_of(role)]


def trained_parameters(store: ParameterStore, update: Update, active: ActiveSet) -> list[str]:
    """Return the names of all parameters that train now, always-active ones first."""
    return [*active.always, *(name for part in active.drawn for name in _trained_in(store, update, part))]


def _trained_in(store: ParameterStore, update: Update, part: str) -> list[str]:
    """Return the parameters that train in a part that was drawn."""
    if block_of(part) is not None:
        return update.trainable_parameters(store.parameters_of(part))
    tied = part == "embeddings" and store.layers.tied  # then a head may have a bias of its own
    return [*store.parameters_of(part), *(store.parameters_of("head") if tied else [])]


def switch_active_blocks(
    store: ParameterStore,
    optimizer: ActiveOptimizer,
    update: Update,
    active: ActiveSet,
    drawn: tuple[list[int], list[str]],
    period: int,
    seed: int,
) -> None:
    """Make what was drawn the active parts: freeze those that leave, thaw those that enter.

    Collective, every rank, where the store splits masters among replicas; else without communication.

    A block in both sets keeps its masters, moments and step count. A leaving block's masters are rounded to
    the frozen dtype (``precision.on_freeze``) and its optimizer state is dropped; an entering one starts with
    zero moments.

    Args:
        store: the model's weights.
        optimizer: holds state for exactly the trained parameters, before and after.
        update: names which parameters of a block train.
        active: changed in place.
        drawn: for the period: the blocks, and the modules outside them.
        period: counted from 0; keys the rounding noise.
        seed: the run's seed; keys the rounding noise.
    """
    blocks, modules = drawn
    before, after = active.drawn, parts_of(blocks, modules)
    leaving = [part for part in before if part not in after]
    entering = [part for part in after if part not in before]
    for part in leaving:
        names = _trained_in(store, update, part)
        optimizer.remove_params(names)
        store.set_trainable(names, trained=False, seed=seed, period=period)
    for part in entering:
        names = _trained_in(store, update, part)
        store.set_trainable(names, trained=True)
        optimizer.add_params({name: store.master(name) for name in names})
    active.blocks, active.modules, active.period = blocks, modules, period
