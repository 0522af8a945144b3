"""The page of one run, ``report.html`` in its directory: what it learned, what trained when, what it needed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lisa_dist.config import UserError
from lisa_dist.config.paths import begins_with
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.units import GIB, format_bytes, format_count, format_duration, format_ranges
from lisa_dist.telemetry.history import MetricsRow, RunState, comparable, course_of, max_steps_of, read_rows, state_of
from lisa_dist.telemetry.reports.charts import (
    MAX_MARKS,
    MAX_POINTS,
    Mark,
    Period,
    Series,
    activity_map,
    activity_shares,
    line_chart,
    norm_map,
    smoothed,
    stacked_chart,
)
from lisa_dist.telemetry.reports.page import PAGE_START, Card, chart, folded_text, render_page, table

SECONDS_BETWEEN_PAGES = 10  # of a run that goes on
SPEED_NOTE = "Padding is left out. Label tokens are those with loss."
TIME_NOTE = (
    "By the clock of rank 0's host: a GPU works behind it, and what it has left to do is the wait for the device. "
    "Switches of blocks, evaluations and checkpoints are not part of a step."
)
NORM_NOTE = (
    "Taken of what trains in a block when its period begins and ends, against the first one known; "
    "between its periods a block stands still."
)


@dataclass
class Record:
    """What a run directory says of its run."""

    run: RunDirectory
    settings: dict[str, Any]
    steps: list[MetricsRow]
    evals: list[MetricsRow]
    layers: list[MetricsRow]
    events: list[MetricsRow]
    plan: MetricsRow
    state: RunState

    @property
    def summary(self) -> MetricsRow:
        """summary.json, {} where there is none."""
        return self.state.summary or {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the model; the most that is known of them where the record does not say."""
        active = [block + 1 for row in self.layers for block in row["active_layers"]]
        return max([row.get("num_blocks") or 0 for row in [*self.layers, self.summary]] + active, default=0)


def write_report(run: RunDirectory, *, live: bool = False) -> Path:
    """Write the page of a run into its directory and return its path.

    Args:
        run: what is shown.
        live: the page loads itself anew while it is open.

    Raises:
        UserError: the directory does not exist, holds no record, or a file of the record is damaged.
    """
    if not run.path.is_dir():
        raise UserError(f"run.dir={run.path}: must be the directory of a run, and there is no such directory")
    try:
        metrics, state = read_rows(run.metrics), state_of(run)
        plan = (read_rows(run.plan) or [{}])[0]
        record = Record(
            run,
            _read_settings(run),
            [row for row in metrics if "eval_loss" not in row],
            [row for row in metrics if "eval_loss" in row],
            read_rows(run.layers),
            read_rows(run.events),
            plan,
            state,
        )
    except (ValueError, OSError) as error:
        raise UserError(f"run.dir={run.path}: its record is damaged: {error}") from None
    if not metrics and state.summary is None and not live:
        raise UserError(
            f"run.dir={run.path}: must hold the record of a run, and there is neither a step in {run.metrics.name} "
            f"nor a {run.summary.name}"
        )
    if not begins_with(run.report, PAGE_START):
        raise UserError(f"run.dir={run.path}: holds a {run.report.name} of another program, which is kept; move that")
    write_atomically(run.report, _page(record, live))
    return run.report


def _page(record: Record, live: bool) -> str:
    marks = _marks(record)
    cards = [_loss_card(record, marks), _activity_card(record), *_answers_card(record), *_charts(record, marks)]
    cards += [*_norm_card(record), _memory_card(record), *_rows_cards(record.summary)]
    for heading, content in (("Configuration", record.settings), ("Summary", record.summary)):
        if content:
            cards.append(Card("", folded_text(heading, yaml.safe_dump(content, sort_keys=False)), wide=True))
    return render_page(
        record.run.path.resolve().name,
        subtitle=_subtitle(record.settings),
        banner=_banner(record, live),
        numbers=_headlines(record),
        cards=cards,
        refresh=SECONDS_BETWEEN_PAGES if live else None,
    )


def _marks(record: Record) -> list[Mark]:
    """Return what happened when: switches of blocks, and the events of the record."""
    marks = []
    for row in record.layers:
        trained = ", ".join([f"blocks {format_ranges(row['active_layers']) or 'none'}", *row.get("active_modules", [])])
        marks.append(Mark(row["step"], "switch", f"period {row.get('period')}: {trained}"))
    events = [Mark(row["step"], row["event"], row["text"]) for row in record.events if row["event"] != "answers"]
    known = {mark.step for mark in events if mark.kind == "resume"}
    marks += [
        Mark(step, "resume", f"went on from step {step}")
        for step in record.summary.get("resumed_from") or []
        if step not in known
    ]
    return marks + events


def _loss_card(record: Record, marks: list[Mark]) -> Card:
    steps, evals = record.steps, record.evals
    x, loss = [row["step"] for row in steps], _column(steps, "loss")
    smooth = smoothed(loss)
    lines = [Series("training, each step" if smooth else "training", x, loss, faint=bool(smooth), color=0)]
    if smooth:
        lines.append(Series("training, smoothed", x, smooth, color=0))
    if evals:
        at = [row["step"] for row in evals]
        lines.append(Series("validation", at, _column(evals, "eval_loss"), dots=len(evals) <= 60, color=1))
    notes = []
    if len(x) > MAX_POINTS:
        notes.append(
            f"Of {len(x):,} steps each chart draws about {MAX_POINTS:,} points a line: each piece's lowest and highest."
        )
    kinds = {mark.kind for mark in marks} - {"switch"}
    if kinds:
        notes.append(f"Dashed: {', '.join(sorted(kinds))}.")
    if len(record.layers) > MAX_MARKS:
        notes.append(f"{len(record.layers):,} switches of blocks are too many to be marked here.")
    return Card("Loss", chart(line_chart(lines, marks=marks, format_y=".4f")), " ".join(notes), wide=True)


def _activity_card(record: Record) -> Card:
    heading, num_blocks = "Which block trained when", record.num_blocks
    recorded = any(row.get("num_blocks") for row in [*record.layers, record.summary])
    blocks = f"{num_blocks} blocks" if recorded else f"at least {num_blocks} blocks, the record does not say how many"
    if not record.layers or num_blocks == 0:
        return Card(heading, '<p class="soft">no period recorded</p>', f"{blocks}." if recorded else "", wide=True)
    periods = [Period(row["step"], row["active_layers"]) for row in record.layers]
    last_step = max([row["step"] for row in record.steps[-1:]] + [periods[-1].step])
    shares = activity_shares(periods, num_blocks, last_step)
    untouched = sum(share == 0 for share in shares)
    note = (
        f"{len(periods)} period{'s' * (len(periods) > 1)}, {blocks}, the last on top; at the right each one's share "
        f"of the steps, {min(shares):.0%} to {max(shares):.0%}." + (f" {untouched} never trained." if untouched else "")
    )
    return Card(heading, chart(activity_map(periods, num_blocks, last_step)), note, wide=True)


def _answers_card(record: Record) -> list[Card]:
    """Return the answers to sample prompts, the first and the last ones side by side with what was expected."""
    given = [row for row in record.events if row["event"] == "answers"]
    if not given:
        return []
    shown = [given[0], *([given[-1]] if len(given) > 1 else [])]
    columns = ["prompt", "expected", *(f"after step {row['step']}" if row["step"] else "before" for row in shown)]
    # By prompt: a resume may have asked others, or fewer.
    found = [{answer["prompt"]: answer["answer"] for answer in row["answers"]} for row in shown]
    rows = [
        [first["prompt"], first["expected"], *(answers.get(first["prompt"], "not asked") for answers in found)]
        for first in given[0]["answers"]
    ]
    return [Card("Answers before and after", table(columns, rows, numbers_from=9), wide=True)]


def _charts(record: Record, marks: list[Mark]) -> list[Card]:
    steps = record.steps
    x = [row["step"] for row in steps]
    marks = [mark for mark in marks if mark.kind != "switch"]

    def lines(*keys: tuple[str, str], format_y: str = ".3~g") -> str:
        series = [Series(name, x, _column(steps, key)) for key, name in keys]
        return chart(line_chart(series, marks=marks, from_zero=True, format_y=format_y))

    seconds = [row.get("part_seconds") or {} for row in steps]
    parts = {"waiting for data": _column(steps, "data_seconds")}
    parts |= {name: [row.get(name) for row in seconds] for name in dict.fromkeys(key for row in seconds for key in row)}
    known = [sum(value or 0 for value in of_step) for of_step in zip(*parts.values())]
    rest = [max(0.0, (row.get("step_seconds") or 0) - sum_) for row, sum_ in zip(steps, known)]
    times = [Series(name, x, values) for name, values in parts.items()] + [Series("everything else", x, rest)]
    speeds = (("tokens_per_second", "all tokens"), ("label_tokens_per_second", "label tokens"))
    has_mfu = any(row.get("mfu") is not None for row in steps)
    return [
        Card("Seconds a step, by part", chart(stacked_chart(times)), TIME_NOTE),
        Card("Tokens per second", lines(*speeds, format_y=".3~s"), SPEED_NOTE),
        *([Card("Utilisation (mfu)", lines(("mfu", "mfu"), format_y=".0%"))] if has_mfu else []),
        Card("Peak memory of rank 0 in each step, GiB", lines(("peak_memory_gib", "GiB"))),
        Card("Gradient norm before clipping", lines(("grad_norm", "norm"))),
        Card("Learning rate", lines(("lr", "rate"))),
    ]


def _norm_card(record: Record) -> list[Card]:
    rows = [row for row in record.layers if row.get("weight_norms")]
    steps = [row["step"] - 1 for row in rows]
    norms = [{int(block): norm for block, norm in row["weight_norms"].items()} for row in rows]
    final, final_step = record.summary.get("weight_norms"), record.summary.get("final_step")
    if final and final_step is not None:
        steps.append(final_step)
        norms.append({int(block): norm for block, norm in final.items()})
    figure = norm_map(steps, norms, record.num_blocks)
    return [Card("Weight norm of each block", chart(figure), NORM_NOTE, wide=True)] if figure else []


def _memory_card(record: Record) -> Card:
    """Return what rank 0 needed: by the law, as planned, as counted, as measured."""
    summary, plan = record.summary, record.plan
    rows: list[list[str]] = []
    if law := summary.get("law_bytes"):
        rows.append([f"persistent, by the law {summary.get('law', '')}".rstrip(), format_bytes(law)])
    for name, known in (("planned", plan.get("persistent_bytes")), ("counted", summary.get("persistent_bytes"))):
        if isinstance(known, dict):
            rows.append([f"persistent, {name}", format_bytes(sum(known.values()))])
            rows += [[f"\u2003{kind.replace('_', ' ')}", format_bytes(size)] for kind, size in known.items() if size]
        elif known:
            rows.append([f"persistent, {name}", format_bytes(known)])
    if peak := plan.get("peak_bytes"):
        at = f" (in {plan['peak_at']})" if "peak_at" in plan else ""
        rows.append([f"peak, planned{at}", format_bytes(peak)])
    if peaks := [value for value in _column([*record.steps, summary], "peak_memory_gib") if value is not None]:
        rows.append(["peak, measured", format_bytes(max(peaks) * GIB)])
    note = "" if plan else f"lisa-dist plan run.dir={record.run.path} adds what is planned."
    return Card("Memory of rank 0", table(["", "bytes"], rows) if rows else chart(None), note)


def _rows_cards(summary: MetricsRow) -> list[Card]:
    """Return what became of the rows of the data, and of the validation data."""
    cards = []
    for key, heading in (("rows", "Rows of the data"), ("validation_rows", "Rows of the validation data")):
        if counts := summary.get(key):
            named = [(name, counts[name]) for name in ("read", "used", "cut") if name in counts]
            named += [(f"left out: {reason}", count) for reason, count in counts.get("left_out", {}).items()]
            cards.append(Card(heading, table(["", "rows"], [[name, str(count)] for name, count in named])))
    return cards


def _headlines(record: Record) -> dict[str, str]:
    """Return the numbers at the top of the page, those that the record has."""
    steps, evals, summary = record.steps, comparable(record.evals, record.events), record.summary

    def known(rows: list[MetricsRow], key: str) -> list[float]:
        return [value for value in _column(rows, key) if value is not None]

    def spent(key: str) -> float:
        """Return the seconds of all steps: a row has their mean over those since the row before."""
        counts = [max(1, row["step"] - before) for row, before in zip(steps, [0, *(row["step"] for row in steps)])]
        return sum(count * (value or 0) for count, value in zip(counts, _column(steps, key)))

    total = max_steps_of(record.run)
    shown = {"steps": (str(steps[-1]["step"]) if steps else "0") + (f" of {total}" if total else "")}
    for name, rows, key in (("training loss", steps, "loss"), ("validation loss", evals, "eval_loss")):
        if course := course_of(rows, key):
            shown[f"last {name}"] = f"{course.last:.4f}"
            if len(known(rows, key)) > 1:
                shown[f"change of {name}"] = course.change
                shown[f"best {name}, step {course.best_step}"] = f"{course.best:.4f}"
    for name in ("tokens", "label tokens"):
        if speeds := known(steps, f"{name.replace(' ', '_')}_per_second"):
            shown[f"{name}/s, median"] = format_count(statistics.median(speeds))
    if memory := known([*steps, summary], "peak_memory_gib"):
        shown["peak memory, rank 0"] = f"{max(memory):.3g} GiB"
    if seconds := summary.get("wall_seconds") or spent("step_seconds"):
        since = ", since the last start" if summary.get("resumed_from") else ""
        shown[f"wall time{since}" if summary.get("wall_seconds") else "time in steps"] = format_duration(seconds)
    if waited := spent("data_seconds"):
        shown["of the steps waiting for data"] = f"{waited / spent('step_seconds'):.1%}"
    if count := summary.get("trained_parameters"):  # whole, or by part
        shown["trained parameters"] = format_count(sum(count.values()) if isinstance(count, dict) else count)
    return shown


def _subtitle(settings: dict[str, Any]) -> str:
    named = [(group, settings.get(group)) for group in ("method", "model", "data")]
    texts = [
        f"{group} {value if isinstance(value, str) else (value.get('path') or value.get('name'))}"
        for group, value in named
        if isinstance(value, (str, dict))
    ]
    return "  ·  ".join(texts)


def _banner(record: Record, live: bool) -> str:
    state = record.state
    if state.name in ("starting", "running"):
        again = f", the page is written anew every {SECONDS_BETWEEN_PAGES} s" if live else ""
        return f"This run goes on; as of {datetime.now():%Y-%m-%d %H:%M:%S}{again}."
    if state.name == "stopped":
        return "This run was stopped on a signal, after a checkpoint: checkpoint.resume=auto goes on with it."
    return f"This run did not finish: {state.reason}" if state.name == "failed" else ""


def _read_settings(run: RunDirectory) -> dict[str, Any]:
    """Return config.yaml without ``launch``, whose shell lines may hold tokens: a page is passed around."""
    path = run.config
    if not path.exists():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"run.dir={run.path}: its {path.name} is damaged: {' '.join(str(error).split())}") from None
    return {key: value for key, value in settings.items() if key != "launch"} if isinstance(settings, dict) else {}


def _column(rows: list[MetricsRow], key: str) -> list[float | None]:
    return [row.get(key) for row in rows]
