"""``lisa-dist report run.dir=DIR``: a run directory becomes one page, ``report.html`` in it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.run_directory import RunDirectory
from lisa_dist.launching.sweeps.comparison import PAGE_FILE, write_comparison
from lisa_dist.runtime.files import write_atomically
from lisa_dist.runtime.units import format_bytes, format_count, format_duration
from lisa_dist.telemetry.history import MetricsRow, read_rows, read_summary, state_of
from lisa_dist.telemetry.reports.page import Card, folded_text, render_page, table
from lisa_dist.telemetry.reports.plots import Period, Series, activity_heatmap, activity_shares, line_chart, smoothed

SECONDS_BETWEEN_PAGES = 10
SPEED_NOTE = "Padding is left out. Label tokens are those with loss."
TIME_NOTE = "Switches of blocks, evaluations and checkpoints are not part of a step."


def run(config: Config) -> int:
    """Write the page of ``run.dir``, or the comparison of ``sweep.dir``, and print where it is.

    Raises:
        UserError: no directory is named, or there is nothing in it to report.
    """
    if config.run.dir is None and config.sweep.dir is not None:
        sweep_dir = Path(config.sweep.dir)
        write_comparison(sweep_dir)
        print(sweep_dir / PAGE_FILE)
        return EXIT_DONE
    if config.run.dir is None:
        raise UserError("run.dir=null: name the directory of a run, as in lisa-dist report run.dir=runs/NAME")
    run = RunDirectory.of(config)
    path = write_report(run, live=config.report.watch)
    print(path, flush=True)
    if config.report.watch:
        watch(run)
    return EXIT_DONE


def watch(run: RunDirectory) -> None:
    """Write the page anew until the run has ended or the user interrupts; then once more, as one that stays."""
    print("the page is kept up to date until the run ends, Ctrl-C stops that", flush=True)
    try:
        while state_of(run).name in ("starting", "running"):
            write_report(run, live=True)
            time.sleep(SECONDS_BETWEEN_PAGES)
    except KeyboardInterrupt:
        print("no longer kept up to date")
    finally:
        write_report(run)


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
        metrics, layers = read_rows(run.metrics), read_rows(run.layers)
        summary = read_summary(run)
    except (ValueError, OSError) as error:
        raise UserError(f"run.dir={run.path}: its record is damaged: {error}") from None
    if not metrics and summary is None:
        raise UserError(
            f"run.dir={run.path}: must hold the record of a run, and there is neither a step in {run.metrics.name} "
            f"nor a {run.summary.name}"
        )
    write_atomically(run.report, _page(run, metrics, layers, summary, live))
    return run.report


def _page(
    run: RunDirectory, metrics: list[MetricsRow], layers: list[MetricsRow], summary: MetricsRow | None, live: bool
) -> str:
    settings = _read_settings(run)
    steps = [row for row in metrics if "eval_loss" not in row]
    evals = [row for row in metrics if "eval_loss" in row]
    marks = (summary or {}).get("resumed_from") or []
    loss, *other_charts = _charts(steps, evals, marks)
    cards = [loss, _activity_card(steps, layers, summary), *other_charts, *_rows_cards(summary or {})]
    if settings:
        cards.append(Card("", folded_text("Configuration", yaml.safe_dump(settings, sort_keys=False)), wide=True))
    if summary:
        cards.append(Card("", folded_text("Summary", yaml.safe_dump(summary, sort_keys=False)), wide=True))
    return render_page(
        run.path.resolve().name,
        subtitle=_subtitle(settings),
        banner=_banner(summary),
        numbers=_headlines(steps, evals, summary or {}),
        cards=cards,
        refresh=SECONDS_BETWEEN_PAGES if live else None,
    )


def _charts(steps: list[MetricsRow], evals: list[MetricsRow], marks: list[float]) -> list[Card]:
    x = [row["step"] for row in steps]

    def chart(key: str, **options: Any) -> str:
        return line_chart([Series(key, x, _column(steps, key))], marks=marks, **options)

    loss = _column(steps, "loss")
    smooth = smoothed(loss)
    lines = [Series("training, each step" if smooth else "training", x, loss, faint=bool(smooth), color=0)]
    if smooth:
        lines.append(Series("training, smoothed", x, smooth, color=0))
    if evals:
        at = [row["step"] for row in evals]
        lines.append(Series("validation", at, _column(evals, "eval_loss"), dots=len(evals) <= 60, color=1))
    note = "Dashed: the run went on from a checkpoint." if marks else ""
    speeds = [
        Series("all tokens", x, _column(steps, "tokens_per_second"), color=0),
        Series("label tokens", x, _column(steps, "label_tokens_per_second"), color=1),
    ]
    times = [
        Series("step", x, _column(steps, "step_seconds"), color=0),
        Series("of it waiting for data", x, _column(steps, "data_seconds"), color=1),
    ]
    has_mfu = any(row.get("mfu") is not None for row in steps)
    short = "{:.3g}".format
    return [
        Card("Loss", line_chart(lines, marks=marks), note),
        Card("Tokens per second", line_chart(speeds, marks=marks, from_zero=True, format_y=format_count), SPEED_NOTE),
        Card("Seconds a step", line_chart(times, marks=marks, from_zero=True, format_y=short), TIME_NOTE),
        *([Card("Utilisation (mfu)", chart("mfu", from_zero=True, format_y="{:.0%}".format))] if has_mfu else []),
        Card("Peak memory of rank 0 in each step, GiB", chart("peak_memory_gib", from_zero=True, format_y=short)),
        Card("Gradient norm before clipping", chart("grad_norm", from_zero=True)),
        Card("Learning rate", chart("lr", from_zero=True)),
    ]


def _activity_card(steps: list[MetricsRow], layers: list[MetricsRow], summary: MetricsRow | None) -> Card:
    heading = "Which block trained when"
    periods = [Period(row["step"], row["active_layers"]) for row in layers]
    drawn = max([max(period.active, default=-1) + 1 for period in periods], default=0)
    recorded = max([row.get("num_blocks") or 0 for row in [*layers, summary or {}]], default=0)
    num_blocks = max(recorded, drawn)
    blocks = f"{num_blocks} blocks" if recorded else f"at least {num_blocks} blocks, the record does not say how many"
    if not periods or num_blocks == 0:
        return Card(heading, activity_heatmap([], 0, 0), f"{blocks}." if recorded else "")
    last_step = max([row["step"] for row in steps] + [periods[-1].step])
    shares = activity_shares(periods, num_blocks, last_step)
    untouched = sum(share == 0 for share in shares)
    note = (
        f"{len(periods)} periods, {blocks}, the last on top; at the right each one's share of the steps, "
        f"{min(shares):.0%} to {max(shares):.0%}." + (f" {untouched} never trained." if untouched else "")
    )
    return Card(heading, activity_heatmap(periods, num_blocks, last_step), note)


def _rows_cards(summary: MetricsRow) -> list[Card]:
    """Return what became of the rows of the data, and of the validation data."""
    cards = []
    for key, heading in (("rows", "Rows of the data"), ("validation_rows", "Rows of the validation data")):
        if counts := summary.get(key):
            left_out = [[f"left out: {reason}", str(count)] for reason, count in counts["left_out"].items()]
            counted = [[name, str(counts[name])] for name in ("read", "used", "cut")]
            cards.append(Card(heading, table(["", "rows"], counted + left_out)))
    return cards


def _headlines(steps: list[MetricsRow], evals: list[MetricsRow], summary: MetricsRow) -> dict[str, str]:
    """Return the numbers at the top of the page, those that the record has."""

    def known(rows: list[MetricsRow], key: str) -> list[float]:
        return [value for value in _column(rows, key) if value is not None]

    shown = {"steps": str(steps[-1]["step"]) if steps else "0"}
    if losses := known(steps, "loss"):
        shown["last training loss"] = f"{losses[-1]:.4f}"
    if losses := known(evals, "eval_loss"):
        shown |= {"last validation loss": f"{losses[-1]:.4f}", "best validation loss": f"{min(losses):.4f}"}
    for name in ("tokens", "label tokens"):
        if speeds := known(steps, f"{name.replace(' ', '_')}_per_second"):
            shown[f"{name}/s, median"] = format_count(statistics.median(speeds))
    if memory := known([*steps, summary], "peak_memory_gib"):
        shown["peak memory, rank 0"] = f"{max(memory):.3g} GiB"
    if seconds := summary.get("wall_seconds") or sum(known(steps, "step_seconds")):
        since = ", since the last start" if summary.get("resumed_from") else ""
        shown[f"wall time{since}" if summary.get("wall_seconds") else "time in steps"] = format_duration(seconds)
    for name, key, write in (
        ("trained parameters", "trained_parameters", format_count),
        ("persistent, rank 0", "persistent_bytes", format_bytes),
    ):
        if value := summary.get(key):  # whole, or by kind
            shown[name] = write(sum(value.values()) if isinstance(value, dict) else value)
    return shown


def _subtitle(settings: dict[str, Any]) -> str:
    named = [(group, settings.get(group)) for group in ("method", "model", "data")]
    texts = [
        f"{group} {value if isinstance(value, str) else (value.get('path') or value.get('name'))}"
        for group, value in named
        if isinstance(value, (str, dict))
    ]
    return "  ·  ".join(texts)


def _banner(summary: MetricsRow | None) -> str:
    if summary is None:
        return "This run has no summary: it is still running, or it ended without being able to write one."
    reason = str(summary.get("exit_reason", "unknown"))
    return "" if reason == "finished" else f"This run did not finish: {reason}"


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
