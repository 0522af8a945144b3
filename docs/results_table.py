"""Prints the table of docs/results.md from docs/results/, after it took in the runs that are named."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
KEPT = ("num_blocks", "rows", "validation_rows", "eval_loss", "persistent_bytes", "trained_parameters", "tokens_seen")


def take_in(run: Path) -> None:
    """Copy what the table and the picture need of a run directory."""
    folder = RESULTS / run.name
    folder.mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "layers.jsonl"):
        shutil.copy(run / name, folder / name)
    summary = json.loads((run / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({key: summary[key] for key in KEPT}, indent=2) + "\n")


def row_of(folder: Path) -> tuple[float, str]:
    """Return the held-out loss of a run at its end, and its row of the table."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before, after = (row["eval_loss"] for row in (rows[0], rows[-1]))
    trained = sum(summary["trained_parameters"].values()) / 1e6
    stays = sum(summary["persistent_bytes"].values()) / MIB
    return after, f"| {folder.name} | {trained:.1f} M | {stays:,.0f} MiB | {before:.3f} | {after:.3f} |"


def table() -> str:
    """Return the table, the lowest loss first."""
    found = sorted(row_of(folder) for folder in RESULTS.iterdir() if folder.is_dir())
    head = [
        "| run | trained at a time | stays in memory | held-out loss before | after |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *(row for _, row in found)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        take_in(Path(argument))
    print(table())
