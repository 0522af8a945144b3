"""Charts as inline SVG: text in the page's own fonts and colours, no script, nothing from the network.

Colours and fonts are classes of the page's style sheet (page.py), so that a chart follows light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 260  # of the drawing; a page scales it to its column
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 12, 38
MAX_POINTS = 500  # a line has; more are thinned to each piece's lowest and highest
MAX_CELLS = 6000  # a heatmap has
NUM_COLORS = 8  # of the style sheet
SMOOTH_FROM = 60  # steps from which on a loss is drawn smoothed


@dataclass
class Series:
    """One line of a chart; points whose y is None are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    faint: bool = False  # drawn thin behind the others
    dots: bool = False  # each point marked
    color: int | None = None  # of the style sheet, counted from 0; None: the series' place in the chart

    def points(self) -> list[tuple[float, float]]:
        """Return the points that can be drawn."""
        return [(x, y) for x, y in zip(self.x, self.y) if y is not None and math.isfinite(y)]


@dataclass
class Period:
    """Which blocks trained from ``step`` on."""

    step: int
    active: list[int] = field(default_factory=list)


def line_chart(
    series: list[Series],
    *,
    format_y: Callable[[float], str] | None = None,
    from_zero: bool = False,
    marks: Sequence[float] = (),
) -> str:
    """Return a chart of one or several lines over the steps; with more than one, a legend.

    Args:
        format_y: how the numbers at the y axis are written.
        from_zero: the y axis begins at 0.
        marks: x positions of dashed vertical lines, where a run was resumed.
    """
    drawn = [one for one in series if one.points()]
    if not drawn:
        return '<p class="empty">nothing recorded</p>'
    xs, ys = zip(*(point for one in drawn for point in one.points()))
    x_ticks = ticks(min(xs), max(xs), 5)
    y_ticks = ticks(0 if from_zero else min(ys), max(ys), 5)
    scale_x = _scale(*_span(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    scale_y = _scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_ticks, y_ticks, scale_x, scale_y, format_y or tick_label(y_ticks))]
    parts += [
        f'<line class="mark" x1="{scale_x(x):.1f}" x2="{scale_x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        for x in marks
        if min(xs) <= x <= max(xs)
    ]
    parts += [_line(one, _color(one, place), scale_x, scale_y) for place, one in enumerate(drawn)]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return svg + (_legend(drawn) if len(drawn) > 1 else "")


def activity_heatmap(periods: list[Period], num_blocks: int, last_step: int) -> str:
    """Return a map of which block trained when, the last block on top, with each block's share of the steps.

    Many periods are drawn together; a cell is then as strong as the share of its steps that trained the block,
    against the largest share of all cells.
    """
    if not periods or num_blocks == 0:
        return '<p class="empty">no period recorded</p>'
    row = max(3.0, min(18.0, 340 / num_blocks))
    height = row * num_blocks + TOP + BOTTOM
    bars = 60  # width of the shares at the right
    first = periods[0].step
    scale_x = _scale(first, max(last_step + 1, first + 1), LEFT, WIDTH - RIGHT - bars)
    top = [TOP + (num_blocks - 1 - block) * row for block in range(num_blocks)]
    parts = []
    columns = activity_columns(periods, num_blocks, last_step)
    strongest = max(max(shares) for _, _, shares in columns)
    for start, end, shares in columns:
        x, width = scale_x(start), scale_x(end) - scale_x(start)
        parts += [
            f'<rect class="cell" x="{x:.1f}" y="{top[block]:.1f}" width="{max(width, 0.5):.1f}" '
            f'height="{row - 0.6:.1f}" opacity="{share / strongest:.2f}"/>'
            for block, share in enumerate(shares)
            if share > 0
        ]
    totals = activity_shares(periods, num_blocks, last_step)
    largest = max(totals) or 1.0  # no block may have trained at all
    left = WIDTH - RIGHT - bars + 6
    for block, share in enumerate(totals):
        parts.append(
            f'<rect class="share" x="{left}" y="{top[block]:.1f}" width="{share / largest * (bars - 6):.1f}" '
            f'height="{row - 0.6:.1f}"><title>block {block}: {share:.0%} of the steps</title></rect>'
        )
    every = math.ceil(12 / row)
    for block in range(0, num_blocks, every):
        parts.append(f'<text x="{LEFT - 6}" y="{top[block] + row / 2 + 4:.1f}" text-anchor="end">{block}</text>')
    bottom = TOP + num_blocks * row
    for x in [tick for tick in ticks(first, last_step, 4) if first <= tick <= last_step]:
        parts.append(f'<text x="{scale_x(x):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT - bars) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 33:.1f}" text-anchor="middle">step</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{bottom + 16:.1f}" text-anchor="end">{max(totals):.0%}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'


def activity_columns(periods: list[Period], num_blocks: int, last_step: int) -> list[tuple[int, int, list[float]]]:
    """Return (first step, step after the last, share of these steps that trained each block) by column."""
    group = math.ceil(len(periods) / max(40, MAX_CELLS // num_blocks))
    ends = [period.step for period in periods[1:]] + [max(last_step, periods[-1].step) + 1]
    columns = []
    for first in range(0, len(periods), group):
        members = list(zip(periods, ends))[first : first + group]
        start, end = members[0][0].step, members[-1][1]
        shares = [0.0] * num_blocks
        for period, period_end in members:
            for block in period.active:
                shares[block] += (period_end - period.step) / max(1, end - start)
        columns.append((start, end, shares))
    return columns


def activity_shares(periods: list[Period], num_blocks: int, last_step: int) -> list[float]:
    """Return the share of all steps in which each block trained."""
    columns = activity_columns(periods, num_blocks, last_step)
    total = columns[-1][1] - columns[0][0]
    return [
        sum((end - start) * shares[block] for start, end, shares in columns) / max(1, total)
        for block in range(num_blocks)
    ]


def moving_average(values: Sequence[float | None], half_life: float) -> list[float | None]:
    """Return the exponential moving average, corrected for its start; gaps stay gaps."""
    keep = 0.5 ** (1 / half_life)
    average, weight = 0.0, 0.0
    smoothed: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            smoothed.append(None)
            continue
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Return a loss of many steps as a moving average; of few steps an empty list: they are drawn as they are."""
    return moving_average(values, len(values) / 60) if len(values) >= SMOOTH_FROM else []


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers from at most ``low`` to at least ``high``."""
    low, high = _span(low, high)
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def tick_label(positions: list[float]) -> Callable[[float], str]:
    """Return how to write numbers of this size with no more digits than their distance needs."""
    step = positions[1] - positions[0]
    if max(abs(position) for position in positions) < 1e-2:
        return lambda value: f"{value:.2g}" if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != round(step, digits + 1):  # steps of 2.5
        digits += 1
    return lambda value: f"{value:.{digits}f}"


def thin(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Return at most about ``MAX_POINTS`` points: of each piece the lowest and the highest, in their order."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    size = math.ceil(2 * len(x) / MAX_POINTS)
    kept: list[int] = []
    for first in range(0, len(x), size):
        piece = range(first, min(first + size, len(x)))
        numbers = [(value, index) for index in piece if (value := y[index]) is not None and math.isfinite(value)]
        kept += sorted({min(numbers)[1], max(numbers)[1]}) if numbers else [first]
    return [x[index] for index in kept], [y[index] for index in kept]


def _line(series: Series, color: int, scale_x: Callable[[float], float], scale_y: Callable[[float], float]) -> str:
    xs, ys = thin(series.x, series.y)
    pieces: list[list[str]] = [[]]
    for x, y in zip(xs, ys):
        if y is None or not math.isfinite(y):
            pieces.append([])
        else:
            pieces[-1].append(f"{scale_x(x):.1f},{scale_y(y):.1f}")
    style = f"line color{color}{' faint' if series.faint else ''}"
    parts = [f'<polyline class="{style}" points="{" ".join(points)}"/>' for points in pieces if len(points) > 1]
    for points in pieces:
        for point in points if series.dots or len(points) == 1 else []:
            x_text, y_text = point.split(",")
            parts.append(f'<circle class="dot color{color}" cx="{x_text}" cy="{y_text}" r="3"/>')
    return "".join(parts)


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    scale_x: Callable[[float], float],
    scale_y: Callable[[float], float],
    format_y: Callable[[float], str],
) -> str:
    parts = []
    for y in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{scale_y(y):.1f}" y2="{scale_y(y):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{scale_y(y) + 4:.1f}" text-anchor="end">{escape(format_y(y))}</text>'
        )
    for x in x_ticks:
        if LEFT - 1 <= scale_x(x) <= WIDTH - RIGHT + 1 and x == int(x):
            parts.append(f'<text x="{scale_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def _legend(series: list[Series]) -> str:
    items = [
        f'<span><i class="color{_color(one, place)}{" faint" if one.faint else ""}"></i>{escape(one.label)}</span>'
        for place, one in enumerate(series)
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _color(series: Series, place: int) -> int:
    return (place if series.color is None else series.color) % NUM_COLORS


def _span(low: float, high: float) -> tuple[float, float]:
    """Return an interval of some width, also around a single value."""
    if high > low:
        return low, high
    margin = abs(low) * 0.5 or 0.5
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)
