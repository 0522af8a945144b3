"""Prints the tables of docs/results.md from docs/results/, after it took in the runs that are named.

``python docs/results_table.py gsm8k/test_200.jsonl runs/*``: a run is named METHOD-RATE-SEED, and answers.jsonl in
its folder holds answers to the problems of the file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
KEPT = ("num_blocks", "rows", "validation_rows", "eval_loss", "persistent_bytes", "trained_parameters", "tokens_seen")
KEPT_OF_STEPS = ("step", "period", "active_layers", "loss", "lr", "grad_norm", "tokens", "label_tokens", "eval_loss")
NAMES = {
    "full": "full",
    "lora": "LoRA, rank 16",
    "lisa": "LISA, γ = 2, one rate",
    "lisa_by_part": "LISA, γ = 2, rates by part",
    "lisa_6_by_part": "LISA, γ = 6, rates by part",
    "lisa_lean": "lean LISA, γ = 2",
}
NUMBER = r"-?\$?\s*-?[\d,]*\.?\d+"
Entry = dict[str, Any]


def lines_of(file: Path) -> list[Entry]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_number(text: str, mark: str = "") -> float | None:
    """Return the first number after ``mark``, without one the last number of all, or None where there is none."""
    found = re.findall(rf"{mark}\s*({NUMBER})", text)
    return float(re.sub(r"[,$\s]", "", found[0 if mark else -1])) if found else None


def counts(answers: Path, problems: Path) -> dict[str, int]:
    """Return how many answers of a run are right, by the number after #### (exact match) and by the last number."""
    right = {row["question"]: last_number(row["answer"], "####") for row in lines_of(problems)}
    given = [(row["answer"], right[row["prompt"]]) for row in lines_of(answers)]
    return {
        "asked": len(given),
        "right": sum(last_number(text, "####") == number for text, number in given),
        "right_by_last_number": sum(
            last_number(text, "####" if "####" in text else "") == number for text, number in given
        ),
        "ended_in_form": sum(bool(re.search(rf"####\s*{NUMBER}\s*$", text)) for text, _ in given),
    }


def read(run: Path, problems: Path) -> Entry:
    """Return what results.json says of a run; one without a configuration is the model as it was."""
    entry: Entry = {"run": run.name, "method": run.name.split("-")[0]}
    if (run / "config.yaml").exists():
        config = yaml.safe_load((run / "config.yaml").read_text())
        summary = json.loads((run / "summary.json").read_text())
        steps = lines_of(run / "metrics.jsonl")
        entry |= {
            "lr": config["optimizer"]["lr"],
            "part_lr": config["optimizer"]["part_lr"],
            "seed": config["train"]["seed"],
            "before": steps[0]["eval_loss"],
            "after": steps[-1]["eval_loss"],
            "trained_parameters": sum(summary["trained_parameters"].values()),
            "persistent_bytes": sum(summary["persistent_bytes"].values()),
        }
    answers = run / "answers.jsonl"
    return entry | (counts(answers, problems) if answers.exists() else {})


def take_in(runs: list[Path], problems: Path) -> None:
    """Put runs into results.json, and beside it the rows and counts of a method's first seed at its better rate."""
    file = RESULTS / "results.json"
    entries = {entry["run"]: entry for entry in json.loads(file.read_text())} if file.exists() else {}
    entries |= {run.name: read(run, problems) for run in runs}
    rows = ",\n".join(json.dumps(entry) for _, entry in sorted(entries.items()))
    file.write_text(f"[\n{rows}\n]\n")
    shown = {candidates[0]["run"] for candidates in by_method(list(entries.values())).values()}
    for run in runs:
        if run.name not in shown:
            continue
        folder = RESULTS / entries[run.name]["method"]
        folder.mkdir(exist_ok=True)
        kept = [{key: row[key] for key in KEPT_OF_STEPS if key in row} for row in lines_of(run / "metrics.jsonl")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        (folder / "layers.jsonl").write_text((run / "layers.jsonl").read_text())
        summary = json.loads((run / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({key: summary[key] for key in KEPT}, indent=2) + "\n")


def by_method(entries: list[Entry]) -> dict[str, list[Entry]]:
    """Return the runs of the first seed of each method, one a learning rate, the lowest loss first."""
    trained = [entry for entry in entries if "after" in entry]
    first = min(entry["seed"] for entry in trained)
    found: dict[str, list[Entry]] = {}
    for entry in sorted(trained, key=lambda entry: float(entry["after"])):
        if entry["seed"] == first:
            found.setdefault(entry["method"], []).append(entry)
    return found


def rate_of(entry: Entry) -> str:
    parts = "".join(f", {part} {rate:.0e}" for part, rate in entry["part_lr"].items())
    return f"{entry['lr']:.0e}{parts}".replace("e-0", "e-")


def right_of(entries: list[Entry]) -> str:
    answered = [entry for entry in entries if "asked" in entry]
    right, asked = (sum(entry[key] for entry in answered) for key in ("right", "asked"))
    return f"{right} of {asked} ({right / asked:.1%})" if asked else "not asked"


def table() -> str:
    """Return the table of the methods at their better learning rates, the lowest mean loss first."""
    entries: list[Entry] = json.loads((RESULTS / "results.json").read_text())
    before = {f"{entry['before']:.3f}" for entry in entries if "before" in entry}
    rows = [(9.0, f"| untrained | | | | {', '.join(before)} | {right_of([e for e in entries if 'after' not in e])} |")]
    for method, (best, *_) in by_method(entries).items():
        runs = [entry for entry in entries if entry["method"] == method and rate_of(entry) == rate_of(best)]
        losses = [entry["after"] for entry in runs]
        spread = f"{mean(losses):.3f}" + (
            f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ", one seed"
        )
        trained, stays = best["trained_parameters"] / 1e6, best["persistent_bytes"] / MIB
        counted = [f"{trained:.1f} M", f"{stays:,.0f} MiB"]
        cells = [NAMES.get(method, method), rate_of(best), *counted, spread, right_of(runs)]
        rows.append((mean(losses), f"| {' | '.join(cells)} |"))
    head = "| run | learning rate | trained at a time | stays in memory | held-out loss | right answers |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- |", *(row for _, row in sorted(rows))])


def rates() -> str:
    """Return the table of the first seed's losses at each learning rate, the lower one first."""
    head = ["| run | chosen rate | held-out loss | other rate | held-out loss |", "| --- | --- | --- | --- | --- |"]
    found = by_method(json.loads((RESULTS / "results.json").read_text()))
    rows = [
        f"| {NAMES.get(method, method)} | " + " | ".join(f"{rate_of(e)} | {e['after']:.3f}" for e in candidates) + " |"
        for method, candidates in found.items()
    ]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_in([Path(argument) for argument in sys.argv[2:]], Path(sys.argv[1]))
    print(f"{table()}\n\n{rates()}")
