"""``lisa-dist plan``: what a configuration needs on a cluster, before anybody pays for it."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.gpu import Gpu, read_gpu
from lisa_dist.config.idle_options import options_without_effect
from lisa_dist.config.paths import begins_with
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.planning.changes import Plan, changes_that_fit, check_plan_streams, make_plan, search
from lisa_dist.planning.simulation import cluster_dims, micro_batches_per_step
from lisa_dist.runtime.files import to_json, write_atomically
from lisa_dist.runtime.units import format_bytes, format_count, format_duration
from lisa_dist.sharding.memory_policy import RESERVED_BYTES

PLAN_STARTS = ('{"persistent_bytes":', '{"step_seconds_range":')  # of the file that a run's report reads


def run(config: Config) -> int:
    """Print what the configuration needs of each rank, and how long a step takes by estimate.

    Raises:
        UserError: the GPU is unknown, or the configuration fits neither the model nor the cluster.
    """
    logging.disable(logging.INFO)  # every simulation builds a model, which would say so
    gpu = read_gpu(config.plan.gpu)
    with Console(stderr=True).status("planning") as status:  # on a terminal; each plan takes seconds
        check_plan_streams(config)
        plan = _plan_with_room(config, gpu, [])
        changes = []
        if not plan.fits:
            status.update("it does not fit: planning changes")
            changes = [replace(it, overrides=[*plan.overrides, *it.overrides]) for it in changes_that_fit(plan)]
        status.update("planning other methods")
        compared = {method: _plan_with_room(config, gpu, [f"method={method}"]) for method in config.plan.compare}
        status.update("looking for the largest micro-batch")
        found = search(config, gpu) if config.plan.search else []
    if config.run.dir is not None and (run := RunDirectory.of(config)).config.is_file():
        try:
            if begins_with(run.plan, *PLAN_STARTS):
                write_atomically(run.plan, to_json(_numbers(plan)) + "\n")  # for the run's report
            else:
                print(f"lisa-dist: {run.plan} is not written, it holds something else; move that", file=sys.stderr)
        except OSError as error:
            print(f"lisa-dist: {run.plan} is not written, {error.strerror}", file=sys.stderr)
    if config.plan.format == "json":
        print(json.dumps(_to_json(plan, changes, compared, found), indent=2))
    else:
        _print_tables(plan, changes, compared, found)
    return EXIT_DONE


def _plan_with_room(config: Config, gpu: Gpu, overrides: list[str]) -> Plan:
    """Return the plan; where ``parallel.offload=auto`` finds no room, that with every frozen block in host memory."""
    try:
        return make_plan(config, gpu, overrides)
    except UserError as error:
        if config.parallel.offload != "auto":
            raise
        plan = make_plan(config, gpu, [*overrides, "parallel.offload=frozen"])
        print(f"lisa-dist: {error}; planned with parallel.offload=frozen", file=sys.stderr)
        return plan


def notes_on(plan: Plan) -> list[str]:
    """Return what a reader must know to read the numbers rightly."""
    config, dims = plan.config, cluster_dims(plan.config.parallel)
    planned = micro_batches_per_step(config) * dims.data_ranks * config.train.micro_batch_size
    notes = ["every sequence is planned full, and every token trained: padding and prompts lower the tokens/s of a run"]
    if planned != config.train.global_batch_size:
        notes.append(
            f"planned with train.global_batch_size={planned}, the next multiple of micro-batch x ranks; "
            f"train would refuse {config.train.global_batch_size}"
        )
    notes += options_without_effect(config, dims.data_ranks)
    if plan.trace.kernels == "compile":
        notes.append(
            "compiled blocks are planned as with Liger's kernels, or as eager ones where those are not known to fit"
        )
    if not plan.fits:
        notes.append(
            f"does not fit: {format_bytes(-plan.head_room)} too much on each rank, "
            f"{format_bytes(-plan.head_room * dims.num_ranks)} on the cluster"
        )
    if not plan.fits_without_activations:
        notes.append("what stays there from step to step is too much by itself: saving activations alone is no remedy")
    return notes


def label_tokens_per_second(plan: Plan) -> float:
    """Return the tokens a second that carry loss where all do but the first of a sequence: the most there can be."""
    length = plan.config.data.sequence_length
    return plan.estimate.tokens_per_second * (length - 1) / length


def _numbers(plan: Plan) -> dict[str, Any]:
    """Return what a plan predicts of the rank that needs most."""
    trace, work = plan.trace, plan.trace.work
    bounds = {} if plan.range is None else {"step_seconds_range": [bound.step_seconds for bound in plan.range]}
    return bounds | {
        "persistent_bytes": trace.persistent_bytes,
        "host_bytes": trace.host_bytes,
        "waiting_bytes": trace.waiting_bytes,
        "peak_bytes": trace.peak_bytes,
        "peak_at": trace.peak_at,
        "fits": plan.fits,
        "kernels": trace.kernels,
        "head_room_bytes": plan.head_room,
        "communication_bytes_per_step": dict(work.sent),
        "link_bytes_per_step": work.link_bytes,
        "flops_per_step": work.flops,
        "step_seconds_estimate": plan.estimate.step_seconds,
        "bound_by": plan.estimate.bound_by,
        "tokens_per_second_estimate": plan.estimate.tokens_per_second,
        "label_tokens_per_second_estimate": label_tokens_per_second(plan),
        "estimate_seconds": asdict(plan.estimate),
    }


def _to_json(plan: Plan, changes: list[Plan], compared: dict[str, Plan], found: list[Plan]) -> dict[str, Any]:
    config = plan.config
    result = {
        **_numbers(plan),
        "model": config.model.name,
        "method": config.method,
        "blocks": plan.trace.num_blocks,
        "active_blocks": plan.trace.num_active,
        "ranks": cluster_dims(config.parallel).num_ranks,
        "gpu": config.plan.gpu,
        "memory_bytes": plan.gpu.memory_bytes,
        "reserved_bytes": RESERVED_BYTES,
        "tokens_per_step": plan.trace.tokens,
        "notes": notes_on(plan),
    }
    for name, others in (("changes", changes), ("search", found)):
        if others:
            result[name] = [{"overrides": other.overrides, **_numbers(other)} for other in others]
    return result | ({"compare": {name: _numbers(other) for name, other in compared.items()}} if compared else {})


def _print_tables(plan: Plan, changes: list[Plan], compared: dict[str, Plan], found: list[Plan]) -> None:
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 120)
    console.print(_table_of(plan))
    for note in notes_on(plan):
        console.print(f"note: {note}")
    if changes:
        title = "changes that make it fit, the cheapest first" if changes[0].fits else "no change tried makes it fit"
        _print_overrides(console, title, changes)
    if compared:
        console.print(_table_of_several("methods", compared))
    if found:
        title = "the largest micro-batch for each kind of checkpointing, the fastest first"
        _print_overrides(console, title, found)


def _print_overrides(console: Console, title: str, plans: list[Plan]) -> None:
    """Print plans as a table, and below it the overrides of each, whole, to be pasted."""
    console.print(_table_of_several(title, {str(number): plan for number, plan in enumerate(plans, start=1)}))
    for number, plan in enumerate(plans, start=1):
        console.print(f"{number}: {' '.join(plan.overrides)}", soft_wrap=True)


def _table_of(plan: Plan) -> Table:
    config, trace, work, times = plan.config, plan.trace, plan.trace.work, plan.estimate
    ranks = cluster_dims(config.parallel).num_ranks
    table = Table(
        title=f"plan: {config.model.name}, {config.method}, {ranks} x {plan.gpu.description}",
        title_justify="left",
        show_header=False,
        title_style="bold",
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    kinds = ", ".join(f"{format_bytes(size)} {kind.replace('_', ' ')}" for kind, size in trace.persistent_bytes.items())
    total = sum(trace.persistent_bytes.values())
    table.add_row("persistent a rank", f"{format_bytes(total)}: {kinds}")
    if trace.host_bytes:
        table.add_row("of it in host memory", format_bytes(trace.host_bytes))
    if trace.waiting_bytes:
        table.add_row("beside it there", f"{format_bytes(trace.waiting_bytes)} of inputs of blocks")
    table.add_row("peak a rank", f"{format_bytes(trace.peak_bytes)}, {trace.peak_at}")
    table.add_row(
        "fits" if plan.fits else "DOES NOT FIT",
        f"{format_bytes(plan.head_room)} of {format_bytes(plan.gpu.memory_bytes)} left, with "
        f"{format_bytes(RESERVED_BYTES)} set aside for CUDA, NCCL and fragmentation",
    )
    checkpointing, micro_batches = config.parallel.activation_checkpointing, micro_batches_per_step(config)
    table.add_row(
        "blocks",
        f"{trace.num_active} of {trace.num_blocks} train, {checkpointing} checkpointing, {trace.kernels} kernels",
    )
    table.add_row(
        "step",
        f"{format_count(trace.tokens)} tokens: {config.train.micro_batch_size} x {config.data.sequence_length} a "
        f"micro-batch, {micro_batches} micro-batch{'es' * (micro_batches > 1)} on "
        f"{'one rank' if ranks == 1 else f'each of {ranks} ranks'}",
    )
    sent = ", ".join(f"{format_bytes(size)} {collective}" for collective, size in work.sent.items()) or "nothing"
    table.add_row("sent by a rank a step", sent)
    if work.link_bytes:
        table.add_row("copied to it a step", f"{format_bytes(work.link_bytes)} from host memory")
    table.add_row("operations a rank a step", f"{format_count(work.flops)} FLOP in matrix products and attention")
    table.add_row(
        "step time, estimate",
        f"{format_duration(times.step_seconds)} (computing {format_duration(times.compute_seconds)}, communicating "
        f"{format_duration(times.communication_seconds)}, host {format_duration(times.host_seconds)}; overlapped, "
        f"{times.bound_by} takes longest)",
    )
    if plan.range is not None:
        quickest, slowest = (format_duration(bound.step_seconds) for bound in plan.range)
        table.add_row("over the draws", f"{quickest} to {slowest}; all but memory is planned as the mean of draws")
    labels = format_count(label_tokens_per_second(plan))
    table.add_row(
        "speed, estimate",
        f"{format_count(times.tokens_per_second)} tokens/s on the whole cluster, at most {labels} label tokens/s",
    )
    return table


def _table_of_several(title: str, plans: dict[str, Plan]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    sends = any(plan.trace.work.sent for plan in plans.values())  # else there is room for the others on 80 columns
    sent = ["sent a step"] if sends else []
    columns = ("", "persistent", "peak", "head-room", "fits", *sent, "step, estimate", "tokens/s, estimate")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for name, plan in plans.items():
        trace = plan.trace
        table.add_row(
            name,
            format_bytes(sum(trace.persistent_bytes.values())),
            format_bytes(trace.peak_bytes),
            format_bytes(plan.head_room),
            "yes" if plan.fits else "no",
            *([format_bytes(sum(trace.work.sent.values()))] if sends else []),
            format_duration(plan.estimate.step_seconds),
            format_count(plan.estimate.tokens_per_second),
        )
    return table
