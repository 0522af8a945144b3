"""``lisa-dist bench``: how fast training steps are and what they need, measured on the trainer's own functions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import profile

from lisa_dist.commands.bench.ceilings import measure_ceilings
from lisa_dist.commands.bench.peers import PEERS
from lisa_dist.commands.bench.rounds import BenchRun, Builder, enter, leave, measure, measure_steps, ratio, summarize
from lisa_dist.commands.bench.steps import PARTS
from lisa_dist.commands.bench.stopwatch import PEAK_MEANINGS
from lisa_dist.commands.bench.targets import FSDP_BASELINE, FsdpBaseline, MethodTarget
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.checks import check_accumulation, check_global_batch
from lisa_dist.config.errors import check_choice
from lisa_dist.config.loading import group_choices, vary
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.data.batches import GlobalBatches
from lisa_dist.data.prepare import prepare_data
from lisa_dist.data.sequences import Sequences
from lisa_dist.models.architecture import read_architecture
from lisa_dist.planning.draws import typical_draws
from lisa_dist.runtime import distributed
from lisa_dist.runtime.units import format_bytes, format_count
from lisa_dist.sharding.dimensions import ParallelDims
from lisa_dist.sharding.rounding import dtype_of
from lisa_dist.telemetry.logs import setup_logging
from lisa_dist.training.flops import preset_of
from lisa_dist.training.limits import check_tokens, open_tokenizer
from lisa_dist.training.setup import make_batches

logger = logging.getLogger(__name__)

RANDOM_SEQUENCES = 64  # of an epoch where no data are given


def run(config: Config) -> int:
    """Measure the configured method, and what ``bench.compare`` or ``bench.sweep`` adds. Collective: every rank.

    Raises:
        UserError: the configuration does not fit the model, the data or the ranks.
    """
    distributed.initialize(config.parallel)
    setup_logging(RunDirectory.of(config).path if config.run.dir else None)
    if config.bench.profile and config.run.dir is None:
        raise UserError("run.dir=null: bench.profile=true writes its trace there, name a directory")
    if config.bench.sweep and config.bench.compare:
        raise UserError("bench.sweep: measures one after the other, so leave out bench.compare, which takes turns")
    result = sweep(config) if config.bench.sweep else compare(config)
    if distributed.is_main():
        print(json.dumps(result)) if config.bench.format == "json" else show(result)
    return EXIT_DONE


def compare(config: Config) -> dict[str, Any]:
    """Measure the configured method and those of ``bench.compare``, taking turns. Collective: every rank."""
    builders: dict[str, tuple[Config, Builder]] = {config.method: (config, MethodTarget)}
    others: dict[str, Builder] = {FSDP_BASELINE: FsdpBaseline, **PEERS}
    for name in config.bench.compare:
        check_choice("bench.compare", name, [*group_choices("method"), *others])
        is_method = name not in others
        target = (vary(config, [f"method={name}"]), MethodTarget) if is_method else (config, others[name])
        builders.setdefault(name, target)
    ceilings = measure_ceilings(distributed.device(), dtype_of(config.precision.compute))
    batches = bench_batches(config)
    depth = read_architecture(config.model).num_hidden_layers
    runs = {
        name: BenchRun(name, variant, build, batches, typical_draws(variant, depth) if build is MethodTarget else {})
        for name, (variant, build) in builders.items()
    }
    together = measure(list(runs.values()))
    if config.bench.profile:
        write_trace(runs[config.method], RunDirectory.of(config).path)
    for bench_run in runs.values():  # a sweep goes on
        leave(bench_run)
    results = {name: summarize(bench_run, ceilings) for name, bench_run in runs.items()}
    reference = FSDP_BASELINE if FSDP_BASELINE in runs else config.method
    for name in runs.keys() - {reference}:
        results[name]["ratio"] = {"to": reference, **ratio(runs[name], runs[reference])}
    result = results[config.method] | machine(config)
    result |= {
        "rounds": len(runs[config.method].rounds),
        "in_memory": "together" if together else "alone",
        "ceilings": ceilings,
        "data_sheet": data_sheet(),
    }
    return result | ({"compare": results} if config.bench.compare else {})


def sweep(config: Config) -> dict[str, Any]:
    """Measure the configuration, then each line of ``bench.sweep`` on top of it. Collective: every rank."""
    results = []
    for line in ["", *config.bench.sweep]:
        variant = vary(config, line.split())
        variant.bench.sweep = []
        results.append({"overrides": line, **compare(variant)})
    return {**results[0], "sweep": results[1:]}


def bench_batches(config: Config) -> GlobalBatches:
    """Return the run's own training batches, or without ``data.path`` random ones of full length.

    Collective: every rank.
    """
    dims = ParallelDims.of(config.parallel)
    check_global_batch(config.train, dims.data_ranks)
    check_accumulation(config, dims.data_ranks)
    vocabulary = read_architecture(config.model).vocab_size
    if config.data.path is None:
        return make_batches(config, dims, random_sequences(config.data.sequence_length, vocabulary), 0)
    tokenizer = open_tokenizer(config.model)
    data = prepare_data(config.data, tokenizer, config.train.seed)
    check_tokens(data.train, tokenizer, vocabulary)
    return make_batches(config, dims, data.train, int(tokenizer.pad_token_id or 0))


def random_sequences(tokens: int, vocabulary: int) -> Sequences:
    """Return sequences of random tokens, all of them trained."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (RANDOM_SEQUENCES, tokens))
    columns = {"input_ids": list(ids), "labels": list(ids), "length": [tokens] * RANDOM_SEQUENCES}
    return Sequences(datasets.Dataset.from_dict(columns))


def machine(config: Config) -> dict[str, Any]:
    """Return on what and with what was measured."""
    device = distributed.device()
    return {
        "ranks": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_threads_per_rank": torch.get_num_threads(),
        "model": config.model.path or config.model.name,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
        "sequence_length": config.data.sequence_length,
        "peak_bytes_are": PEAK_MEANINGS[device.type],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def data_sheet() -> dict[str, float] | None:
    """Return what this GPU's maker states of the rates that are measured too; None without a preset in conf/gpu."""
    gpu = preset_of(distributed.device())
    if gpu is None:
        return None
    return {"matrix_flops": gpu.matrix_flops, "memory_bandwidth": gpu.memory_bandwidth}


def write_trace(bench_run: BenchRun, directory: Path) -> None:
    """Write a trace of one step of each rank, for chrome://tracing or Perfetto. Collective: every rank."""
    directory.mkdir(parents=True, exist_ok=True)
    if bench_run.target is None:
        enter(bench_run)
    with profile() as recorded:
        measure_steps(bench_run, 1)
    file = directory / f"trace_rank_{distributed.rank()}.json"
    recorded.export_chrome_trace(str(file))
    logger.info("trace of one step of %s: %s", bench_run.name, file)


def show(result: dict[str, Any]) -> None:
    """Print the results as a table. Nothing in it is markup: a path may hold [brackets]."""
    rows = list(result.get("compare", {result["method"]: result}).values()) + result.get("sweep", [])
    title = f"lisa-dist bench: {result['model']}, {result['ranks']} x {result['device']}"
    table = Table(title=title, title_justify="left")
    timed = [f"{part} s" for part in PARTS]
    for heading in (
        "",
        "tokens/s",
        "label tokens/s",
        "step s",
        *timed,
        "switch in steps",
        "peak",
        "use",
        "of ceiling",
        "ratio",
    ):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for row in rows:
        step, relative = row["step_seconds"], row.get("ratio")
        parts = step["by_part"]
        table.add_row(
            row.get("overrides") or row["method"],
            format_count(row["tokens_per_second"]),
            format_count(row["label_tokens_per_second"]),
            f"{step['median']:.4f} ± {step['spread']:.4f}",
            *(f"{parts[part]:.4f}" if part in parts else "" for part in PARTS),
            f"{row['switch_in_steps']:.2f}",
            format_bytes(row["peak_bytes"]),
            *("" if row[key] is None else f"{row[key]:.0%}" for key in ("utilisation", "utilisation_of_ceiling")),
            "" if relative is None else f"{relative['median']:.3f} ± {relative['spread']:.3f}",
        )
    console = Console(width=180, highlight=False, markup=False)
    console.print(table)
    console.print(
        f"{result['measured_steps']} steps each in {result['rounds']} rounds; tokens/s counts every token but "
        "padding, label tokens/s those with loss; ± is the distance between the quartiles; the switch is shared out "
        f"over the steps of a period; peak of a rank: {result['peak_bytes_are']}; torch {result['torch']}"
    )
    for note in notes_on(result, rows):
        console.print(note)


def notes_on(result: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return what a reader must know of this measurement beside its numbers."""
    ceilings, sheet = result["ceilings"], result["data_sheet"]
    matrix, copy = ceilings["matrix_flops"] / 1e12, ceilings["copy_bytes_per_second"] / 1e9
    notes = [f"ceilings, measured here: matrix product {matrix:.3g} TFLOP/s, copy {copy:.4g} GB/s (read and written)"]
    if sheet is not None:
        notes[0] += (
            f"; data sheet {sheet['matrix_flops'] / 1e12:.3g} TFLOP/s, {sheet['memory_bandwidth'] / 1e9:.4g} GB/s"
        )
    if result["in_memory"] == "alone":
        notes.append("no room for all at a time: each was alone in memory, and built anew for each round")
    for row in rows:
        if "draws" in row:
            draws = ", ".join(
                f"{name} {draw['blocks']} {draw['step_seconds']:.4f} s" for name, draw in row["draws"].items()
            )
            notes.append(
                f"{row['method']}: the backward pass ends at the lowest active block; mean of the draws {draws}"
            )
    names = [f"{row['method']} {row['kernels']}" for row in rows]
    notes.append(f"kernels: {', '.join(names)}")
    return notes
