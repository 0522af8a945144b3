"""The prediction for a deep model from two simulations of shallow ones, exact because its blocks are alike."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

from lisa_dist.config import Config, ModelConfig
from lisa_dist.config.checks import check_combinations
from lisa_dist.config.sampling import UniformSamplerConfig
from lisa_dist.method.sampling import build_sampler
from lisa_dist.method.switch import drawable_modules
from lisa_dist.models.architecture import build_meta_model
from lisa_dist.models.layer_map import find_layers
from lisa_dist.planning.draws import coming_draws, mean_lowest
from lisa_dist.planning.simulation import Trace, architecture_of, extreme_sets, follow, simulate
from lisa_dist.sharding.ledger import between

EDGE = 1  # frozen blocks at either end, and before the active ones, that are looked at one by one


def predict(config: Config, least_work: bool = False) -> Trace:
    """Return what :func:`simulate` returns, within seconds at any depth.

    One frozen block more adds the same bytes, operations and communication at every phase. So where all blocks
    are alike, two depths settle the line. The phases within the blocks in between are left out: activations
    only grow in the forward and only shrink in the backward pass, so the peak is at an end.

    Raises:
        UserError: the configuration fits neither the model nor the cluster.
    """
    if config.sampler.draws_non_block_modules:
        return max((predict(draw) for draw in draws_of_modules(config)), key=lambda trace: trace.peak_bytes)
    if "auto" in (config.parallel.activation_checkpointing, config.parallel.offload):
        return simulate(config, None, least_work)  # every block has a kind or a place of its own
    depth = architecture_of(config.model).num_hidden_layers
    num_active = len(extreme_sets(config, depth)[1])
    # From one frozen block more than are copied or gathered at a time.
    ahead = config.parallel.copied_ahead if config.parallel.offload == "frozen" else config.parallel.gathered_ahead
    shallow = max(2 * EDGE + 1, 2 + ahead) + (0 if num_active == depth else num_active)
    if config.sampler.listed_blocks is not None or shallow + 2 >= depth or not has_equal_blocks(config.model):
        return simulate(config, None, least_work)
    return extrapolate(simulate(config, shallow, least_work), simulate(config, shallow + 1, least_work), depth)


def predict_over_draws(config: Config) -> tuple[Trace, tuple[Trace, Trace] | None]:
    """Return the trace whose peaks are those of any draw, with the mean work of a step, and the range of draws.

    The range, from the draw of the shortest backward pass to that of the longest, is None where the draw doesn't
    matter (see ``draws.py``). In between the work grows by the same amount for each block that the backward pass
    reaches.

    Raises:
        UserError: the configuration fits neither the model nor the cluster.
    """
    trace = predict(config)
    draws = coming_draws(config, trace.num_blocks)
    if not draws:
        return trace, None
    least = predict(config, least_work=True)
    reached = 1 - mean_lowest(draws) / (trace.num_blocks - trace.num_active)
    forward, backward = (between(less, more, reached) for less, more in zip(least.streamed, trace.streamed))
    mean = replace(trace, work=between(least.work, trace.work, reached), streamed=(forward, backward))
    return mean, (least, trace)


def draws_of_modules(config: Config) -> list[Config]:
    """Return, for each way in which embeddings and head can be among what is drawn, what trains then as if always.

    Raises:
        UserError: more is to be drawn than there is.
    """
    check_combinations(config)
    architecture = architecture_of(config.model)
    modules = drawable_modules(config.sampler, find_layers(build_meta_model(config.model, architecture)))
    num_blocks = architecture.num_hidden_layers
    count = build_sampler(config.sampler, num_blocks + len(modules)).num_active
    found = []
    for drawn in itertools.chain.from_iterable(itertools.combinations(modules, size) for size in range(3)):
        if 0 <= count - len(drawn) <= num_blocks:
            head = drawn == ("embeddings",) if len(modules) == 1 else "head" in drawn
            always = replace(config.always_active, embeddings="embeddings" in drawn, head=head)
            sampler = UniformSamplerConfig(active_layers=count - len(drawn), period=config.sampler.period)
            found.append(replace(config, always_active=always, sampler=sampler))
    return found


def has_equal_blocks(config: ModelConfig) -> bool:
    """Whether all blocks of the model have parameters of the same names and shapes, and attention of one kind."""
    architecture = architecture_of(config)
    blocks = find_layers(build_meta_model(config, architecture), config.blocks).blocks
    shapes = [[(name, parameter.shape) for name, parameter in block.named_parameters()] for block in blocks]
    kinds = set(getattr(architecture, "layer_types", None) or [])
    return len(kinds) <= 1 and all(other == shapes[0] for other in shapes)


def extrapolate(shallow: Trace, deeper: Trace, num_blocks: int) -> Trace:
    """Follow the line through two traces, of which the second is of one block more, to ``num_blocks``."""
    all_active = shallow.num_active == shallow.num_blocks
    num_active = num_blocks if all_active else shallow.num_active
    tail = EDGE + (0 if all_active else num_active)
    first, second = (replace(trace, peaks=_relative_peaks(trace, tail)) for trace in (shallow, deeper))
    found = follow(first, second, num_blocks - shallow.num_blocks)
    peaks = {_absolute(phase, num_blocks): peak for phase, peak in found.peaks.items()}
    return replace(found, num_blocks=num_blocks, num_active=num_active, peaks=peaks)


def _relative_peaks(trace: Trace, tail: int) -> dict[str, int]:
    """Return the peaks with the last ``tail`` blocks counted from the end (-1) and those in the middle left out."""
    found = {}
    for phase, peak in trace.peaks.items():
        named = re.fullmatch(r"(.*) of block (\d+) of (\d+)", phase)
        if named is None:
            found[phase] = peak
            continue
        index, depth = int(named[2]), int(named[3])
        if index < EDGE:
            found[f"{named[1]} of block {index}"] = peak
        elif index >= depth - tail:
            found[f"{named[1]} of block {index - depth}"] = peak
    return found


def _absolute(phase: str, num_blocks: int) -> str:
    named = re.fullmatch(r"(.*) of block (-?\d+)", phase)
    return phase if named is None else f"{named[1]} of block {int(named[2]) % num_blocks} of {num_blocks}"
