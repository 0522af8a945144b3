"""``make gpu-check``: every option, family and command once, then the standing benchmark, on one GPU.

    python -m tests.gpu.check [--output gpu_check.json] [--seconds 400] [--processes 1] [--tiny] [NAME ...]

Prints a line a check and writes all numbers as JSON, of which docs/performance.md takes its table. ``--processes``
makes so many checks at a time, beside the tests that need a GPU; what measures time has the GPU to itself afterwards.
``--tiny`` runs the same on a CPU with small models. What is not reached in time is named, and the exit code is then 1
as it is for a check that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lisa_dist.commands.bench import command as bench
from lisa_dist.config.loading import load
from lisa_dist.config.placement import ParallelConfig
from lisa_dist.runtime import distributed
from tests.gpu.matrix import Matrix, checks

BENCH = "benchmark"
TINY_MODEL = (
    "model.architecture={model_type:llama,vocab_size:96,hidden_size:32,intermediate_size:48,num_hidden_layers:4,"
    "num_attention_heads:2,num_key_value_heads:2}"
)
RUN = ["model.init=random", "data=custom", "train.global_batch_size=2", "train.micro_batch_size=2"]
PEERS = "bench.compare=[lora,peer_lora,peer_lisa]"
LARGE_MEMORY = 70 * 2**30


def standing_benchmark(tiny: bool) -> tuple[list[str], list[str]]:
    """Return the run that is measured, as the largest that this device holds, and how."""
    if tiny:
        model = ["model=custom", TINY_MODEL, "data.sequence_length=24", "precision.compute=float32"]
        return [*model, *RUN, "parallel.cpu_threads=1"], [PEERS, "bench.steps=2", "bench.rounds=2"]
    large = torch.cuda.get_device_properties(0).total_memory > LARGE_MEMORY
    model = [f"model={'llama3_1_8b' if large else 'tinyllama'}", f"data.sequence_length={4096 if large else 2048}"]
    return [*model, *RUN, "parallel.nproc_per_node=1"], [PEERS, "bench.steps=8", "bench.rounds=2"]


def benchmark(tiny: bool) -> dict[str, Any]:
    """Measure LISA and LoRA beside the peers, and what was planned of LISA."""
    run, how = standing_benchmark(tiny)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert bench.run(load([*run, *how, "bench.warmup_steps=2", "bench.format=json"])) == 0
    measured: dict[str, Any] = json.loads(output.getvalue())
    # Planning has a process group of its own.
    command = [sys.executable, "-m", "lisa_dist", "plan", *run, "plan.gpu=h100_80gb", "plan.format=json"]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return measured | {
        "command": " ".join(["lisa-dist bench", *run, *how]),
        "planned_peak_bytes": planned["peak_bytes"],
    }


def check_benchmark(measured: dict[str, Any]) -> str:
    """Return the table's rows as one line, once the numbers were looked at."""
    rows = measured["compare"]
    assert list(rows) == ["lisa", "lora", "peer_lora", "peer_lisa"]
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    share = measured["utilisation_of_ceiling"]
    assert 0 < share <= 1.2, f"{share} of the matrix rate measured in the same call"
    planned = measured["planned_peak_bytes"] / measured["peak_bytes"]
    assert abs(planned - 1) < 0.1, f"planned peak is {planned:.3f} of the measured one"
    speeds = ", ".join(f"{name} {row['tokens_per_second']:.0f} tok/s" for name, row in rows.items())
    return f"{speeds}; planned peak {planned:.3f} of the measured"


def run_checks(matrix: Matrix, only: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Make the checks, all or those named, until the time is over; print a line each and return what they found."""
    started = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    numbers: dict[str, Any] = {}

    def measure() -> str:
        numbers.update(benchmark(matrix.tiny))
        return check_benchmark(numbers)

    for name, check in {**checks(matrix), BENCH: measure}.items():
        if only and name not in only:
            continue
        if time.perf_counter() - started > seconds:
            results[name] = {"state": "not run", "found": "no time was left"}
            print(f"{name:24s} not run", flush=True)
            continue
        began, log = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stderr(log), contextlib.redirect_stdout(io.StringIO()):
                state, found = "ok", check()
        except Exception as error:
            state, found = "failed", f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
            print(f"{log.getvalue()[-2000:]}{traceback.format_exc()}", file=sys.stderr, flush=True)
        spent = time.perf_counter() - began
        results[name] = {"state": state, "found": found, "seconds": spent}
        print(f"{name:24s} {state:7s} {spent:6.1f} s  {found}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if numbers:
        results[BENCH]["numbers"] = numbers
    return results


def run_side_by_side(names: list[str], chosen: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Make the checks in several processes, with pytest's tests beside them; then, alone, what measures time."""

    def checked(place: int, some: list[str]) -> dict[str, dict[str, Any]]:
        output = folder / f"part_{place}.json"
        options = ["--output", str(output), "--seconds", str(chosen.seconds), *(["--tiny"] if chosen.tiny else [])]
        ended = subprocess.run([sys.executable, "-m", "tests.gpu.check", *options, *some], check=False)
        if output.exists():
            return dict(json.loads(output.read_text())["checks"])
        return {name: {"state": "failed", "found": f"its process ended with {ended.returncode}"} for name in some}

    def tested(name: str, marks: str) -> dict[str, dict[str, Any]]:
        if chosen.names:
            return {}
        began, command = time.perf_counter(), [sys.executable, "-m", "pytest", "-q", "-m", marks, "tests/gpu"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(ended.stdout, ended.stderr, sep="", flush=True)
        state, found = ("failed" if ended.returncode else "ok"), ended.stdout.strip().splitlines()[-1]
        print(f"{name:24s} {state:7s} {time.perf_counter() - began:6.1f} s  {found}", flush=True)
        return {name: {"state": state, "found": found, "seconds": time.perf_counter() - began}}

    beside = [name for name in names if name != BENCH]
    parts = [beside[place :: chosen.processes] for place in range(min(chosen.processes, len(beside)))]
    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(parts) + 1) as pool:
        tests = pool.submit(tested, "tests", "gpu and not alone")
        for found in pool.map(checked, range(len(parts)), parts):
            results |= found
        results |= tests.result()
    results |= tested("tests that measure", "gpu and alone")
    return results | (checked(len(parts), [BENCH]) if BENCH in names else {})


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("names", nargs="*")
    chosen = parser.parse_args(arguments)
    if not chosen.tiny and not torch.cuda.is_available():
        print("torch sees no GPU, gpu-check needs one (--tiny tries the same on a CPU)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        matrix = Matrix(Path(folder), chosen.tiny)
        if chosen.processes > 1:
            results = run_side_by_side(chosen.names or [*checks(matrix), BENCH], chosen, Path(folder))
        else:
            distributed.initialize(ParallelConfig(cpu_threads="1") if chosen.tiny else ParallelConfig())
            results = run_checks(matrix, chosen.names, chosen.seconds)
    about = {"torch": torch.__version__, "device": "cpu" if chosen.tiny else torch.cuda.get_device_name()}
    chosen.output.write_text(json.dumps({**about, "checks": results}, indent=1))
    good = sum(result["state"] == "ok" for result in results.values())
    print(f"{good} of {len(results)} checks ok; all numbers in {chosen.output}")
    return 0 if good == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
