"""The methods side by side, from sweeps over methods, learning rates and seeds: a table, and a plot of loss by memory.

Of each method the learning rate with the lowest held-out loss at seed 0 counts, with all seeds that were run at it.

    python docs/method_comparison.py sweeps/tuning sweeps/seeds plot.svg      (needs the extra `docs`)
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

MIB = 2**20

Losses = dict[str, dict[float, dict[int, float]]]  # method -> learning rate -> seed -> held-out loss


def read_sweeps(folders: list[Path]) -> tuple[Losses, dict[str, float]]:
    """Return the held-out losses of all jobs, and the persistent MiB of each method."""
    losses: Losses = defaultdict(lambda: defaultdict(dict))
    memory = {}
    for folder in folders:
        with (folder / "sweep.csv").open() as file:
            for row in csv.DictReader(file):
                settings = dict(word.split("=", 1) for word in row["overrides"].split() if "=" in word)
                method, lr = settings["method"], float(settings["optimizer.lr"])
                losses[method][lr][int(settings.get("train.seed", 0))] = float(row["eval_loss"] or "nan")
                summary = json.loads((Path(row["run_dir"]) / "summary.json").read_text())
                memory[method] = sum(summary["persistent_bytes"].values()) / MIB
    return losses, memory


def tuned(by_rate: dict[float, dict[int, float]]) -> tuple[float, list[float]]:
    """Return the best learning rate of seed 0 and the losses of all seeds at it."""
    rate = min(by_rate, key=lambda rate: by_rate[rate][0])
    return rate, list(by_rate[rate].values())


def main() -> None:
    """Print both tables and draw the plot."""
    *folders, plot = sys.argv[1:]
    losses, memory = read_sweeps([Path(folder) for folder in folders])
    best = {method: tuned(by_rate) for method, by_rate in losses.items()}
    order = sorted(best, key=lambda method: statistics.mean(best[method][1]))
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})

    print("| method | optimizer.lr | held-out loss | seeds | persistent MiB |\n| --- | ---: | ---: | ---: | ---: |")
    for method in order:
        rate, found = best[method]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        print(f"| `{method}` | {rate:g} | {statistics.mean(found):.3f}{spread} | {len(found)} | {memory[method]:.1f} |")
    print("\n| held-out loss at seed 0 |", " | ".join(f"{rate:g}" for rate in rates), "|")
    print("| --- |" + " ---: |" * len(rates))
    for method in order:
        cells = (f"{losses[method][rate][0]:.3f}" if rate in losses[method] else "" for rate in rates)
        print(f"| `{method}` |", " | ".join(cells), "|")

    plt.rcParams["svg.fonttype"] = "none"  # text stays text
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in order:
        found = best[method][1]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        axes.errorbar(memory[method], statistics.mean(found), yerr=spread, fmt="o", capsize=4, label=method)
    axes.set_xlabel("persistent memory, MiB")
    axes.set_ylabel("held-out loss, mean and standard deviation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot)


if __name__ == "__main__":
    main()
