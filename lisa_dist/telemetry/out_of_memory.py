"""Memory that runs out: one sentence with the phase, what was asked for, what is free, and what needs less."""

from __future__ import annotations

import errno
import re
import shlex
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from lisa_dist.config import Config, OutOfMemoryError, UserError
from lisa_dist.config.checks import check_accumulation, check_combinations, check_streamed
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.loading import vary
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime import distributed
from lisa_dist.runtime.redaction import hide_secrets
from lisa_dist.runtime.units import format_bytes
from lisa_dist.telemetry.memory import free_memory_bytes

SMALLEST_LOSS_CHUNK = 64  # tokens: the logits of fewer take no memory worth the time
# Parts of a run whose memory does not depend on the micro-batch.
PREPARATION = "the preparation of data and model"
BENCH, EVALUATE, GENERATE = "bench", "evaluate", "generate"  # commands, each of which is one phase
WITHOUT_ACTIVATIONS = (PREPARATION, "the draw and switch of active blocks", "optimizer", "the checkpoint")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on a GPU or for the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator for the CPU, a GPU's driver, and safetensors have no class of their own for it.
    texts = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "Cannot allocate memory")
    return any(text in str(error) for text in texts)


@contextmanager
def explaining_out_of_memory(config: Config, phase: Callable[[], str], *, log: bool = True) -> Iterator[None]:
    """Raise :class:`OutOfMemoryError` where the body runs out of memory.

    Args:
        config: of the command.
        phase: says what it was about when it happened, as ``forward of step 3``.
        log: write the traceback into this rank's log in ``run.dir``, which is settled.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if log:
            file = RunDirectory.of(config).rank_log(distributed.rank())
            with suppress(OSError):  # a full disk has no room for it
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as opened:
                    opened.write(hide_secrets("".join(traceback.format_exception(error))))
        raise OutOfMemoryError(describe(error, config, phase())) from error


def describe(error: BaseException, config: Config, phase: str) -> str:
    """Return the sentence for an error that :func:`is_out_of_memory` knows."""
    ranks, local_ranks = distributed.world_size(), distributed.local_world_size()
    asked, free = amounts(str(error))
    found = [f"{asked} were asked for"] if asked else []
    if free is not None:
        found.append(f"{free} were free")
    elif (left := free_memory_bytes()) is not None:
        found.append(f"{format_bytes(left)} are free now")  # what the phase had so far is given back already
    start = f"out of memory in {phase}" + (f", {' and '.join(found)}" if found else "")
    on_gpu = distributed.device().type == "cuda"
    return f"{start}; {advice(config, phase, ranks=ranks, local_ranks=local_ranks, on_gpu=on_gpu)}"


def amounts(message: str) -> tuple[str | None, str | None]:
    """Return what an allocator's message says was asked for and was free, as ``512.0 MiB``; None where it does not."""
    asked = re.search(r"(?:tried|Tried|Unable) to allocate ([\d.]+) (bytes|[KMGTP]?i?B)", message)
    free = re.search(r"of which ([\d.]+ [KMGT]?i?B) is free", message)
    if asked is None:
        return None, free[1] if free else None
    amount = format_bytes(int(asked[1])) if asked[2] == "bytes" else f"{asked[1]} {asked[2]}"
    return amount, free[1] if free else None


def advice(config: Config, phase: str, *, ranks: int, local_ranks: int, on_gpu: bool) -> str:
    """Return which keys need less memory, the one that costs least first, and the command that plans it."""
    changes: dict[str, str] = {}
    for key, value, now in savings(config, phase, on_gpu):
        if key not in changes and _helps(config, key, value, ranks):
            changes[key] = f"{key}={value} (now {now})"
    remedies = f"what needs less, in the order to try it: {', '.join([*changes.values(), 'more ranks'])}"
    if phase in (EVALUATE, GENERATE):  # a plan is one of training
        return remedies
    has_run = phase != BENCH and config.run.dir is not None
    command = ["lisa-dist", "plan", f"run.dir={config.run.dir}" if has_run else "..."]
    command += [f"parallel.nproc_per_node={local_ranks}"]
    command += [f"parallel.nodes={ranks // local_ranks}"] if ranks > local_ranks else []
    command += ["plan.gpu=NAME"] if on_gpu else []
    settings = "" if has_run else ", with the settings given here in the place of the dots"
    return f"{remedies}; what a change would need is shown when it is added to: {shlex.join(command)}{settings}"


def savings(config: Config, phase: str, on_gpu: bool) -> list[tuple[str, object, object]]:
    """Return what lowers the memory of a phase, the cheapest first, whether or not the other keys allow it.

    Returns:
        Key, smaller value, present value; of a key that is there twice the later value saves more.
    """
    micro, length = config.train.micro_batch_size, config.data.sequence_length
    chunk = config.model.chunk_tokens(in_place=on_gpu and config.model.kernels != "eager")
    found: list[tuple[str, object, object]] = []
    has_activations = phase != GENERATE and not phase.startswith(WITHOUT_ACTIVATIONS)
    if has_activations:
        divisors = [size for size in range(1, micro) if micro % size == 0]  # so that the global batch stays a multiple
        found += [("train.micro_batch_size", divisors[-1], micro)] if divisors else []
        checkpointing = config.parallel.activation_checkpointing
        if checkpointing != "full" and phase != EVALUATE:
            found.append(("parallel.activation_checkpointing", "full", checkpointing))
        smaller_chunk = min(chunk, micro * length) // 4
        if smaller_chunk >= SMALLEST_LOSS_CHUNK:
            found.append(("model.loss_chunk", smaller_chunk, config.model.loss_chunk))
        if config.parallel.block_major:
            if on_gpu and not config.parallel.offload_activations:
                found.append(("parallel.offload_activations", "true", "false"))
            found.append(("parallel.block_major", "false", "true"))
    offload = config.parallel.offload
    if on_gpu:  # without one, host memory is what ran out
        kinds = ["none", "auto", "frozen", "all"] if offload == "auto" else ["none", "frozen", "all"]
        found += [("parallel.offload", kind, offload) for kind in kinds[kinds.index(offload) + 1 :]]
    if has_activations:
        found.append(("data.sequence_length", max(2, length // 2), length))
    elif phase != GENERATE and not config.sampler.draws_once and (active := config.sampler.active_layers or 0) > 1:
        found.append(("sampler.active_layers", active // 2, active))
    return found


def _helps(config: Config, key: str, value: object, ranks: int) -> bool:
    """Whether training would take ``key=value`` beside the other keys, and do something else for it."""
    try:
        varied = vary(config, [f"{key}={value}"])
        check_combinations(varied)
        check_accumulation(varied, ranks)
        check_streamed(varied, ranks)
    except UserError:
        return False
    return not any(sentence.startswith(f"{key}=") for sentence in options_without_effect(varied, ranks))
