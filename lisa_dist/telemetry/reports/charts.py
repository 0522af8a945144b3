"""Charts as figures of plotly.js, plain dictionaries; colours and fonts are given by the page (page.py).

A trace's ``meta`` is the number of its colour; the style of its line says the same to those who see no colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_POINTS = 1000  # a line has; more are thinned to each piece's lowest and highest
MAX_CELLS = 6000  # a map has
MAX_LEGEND = 10  # lines that a legend names; more are named under the pointer
MAX_MARKS = 300  # of periods on the axis; more can't be told apart
SMOOTH_FROM = 60  # steps from which on a loss is drawn smoothed
DASHES = ("solid", "dash", "dot", "longdash", "dashdot")

Figure = dict[str, Any]


@dataclass
class Series:
    """One line of a chart; points whose y is None are gaps."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    faint: bool = False  # drawn thin behind the others
    dots: bool = False  # each point marked
    color: int | None = None  # counted from 0; None: the series' place in the chart


@dataclass
class Mark:
    """Something that happened at a step: drawn on the axis, its text shown on hovering."""

    step: int
    kind: str  # resume, fault, roll-back or switch
    text: str


@dataclass
class Period:
    """Which blocks trained from ``step`` on."""

    step: int
    active: list[int] = field(default_factory=list)


SYMBOLS = {"switch": "line-ns-open", "resume": "triangle-right", "fault": "x", "roll-back": "triangle-left"}


def line_chart(
    series: list[Series], *, format_y: str = ".4~g", from_zero: bool = False, marks: Sequence[Mark] = ()
) -> Figure | None:
    """Return a chart of one or several lines over the steps, None where there is no point.

    Args:
        series: thinned to ``MAX_POINTS`` where they have more.
        format_y: how numbers are written, in d3's words.
        from_zero: the y axis begins at 0.
        marks: what happened when, see :class:`Mark`.
    """
    drawn = [one for one in series if any(y is not None and math.isfinite(y) for y in one.y)]
    if not drawn:
        return None
    traces = []
    for place, one in enumerate(drawn):
        x, y = thin(one.x, one.y)
        color = place if one.color is None else one.color
        few = len([value for value in y if value is not None]) == 1
        line = {"width": 1 if one.faint else 2, "dash": DASHES[0 if one.faint else color % len(DASHES)]}
        traces.append(
            {"x": x, "y": y, "name": one.label, "meta": color, "mode": "lines+markers" if one.dots or few else "lines",
             "line": line, "opacity": 0.35 if one.faint else 1, "hovertemplate": f"%{{y:{format_y}}}"}
        )  # fmt: skip
    layout = _layout(340, from_zero=from_zero, format_y=format_y)
    layout["shapes"] = [
        {"type": "line", "x0": mark.step, "x1": mark.step, "yref": "paper", "y0": 0, "y1": 1}
        for mark in marks
        if mark.kind != "switch"
    ]
    layout["showlegend"] = 1 < len(traces) <= MAX_LEGEND
    return {"data": [*traces, *_mark_traces(marks)], "layout": layout}


def stacked_chart(series: list[Series]) -> Figure | None:
    """Return the series, which share their x, on top of each other; many steps are drawn as means of pieces."""
    drawn = [one for one in series if any(one.y)]
    if not drawn:
        return None
    size = math.ceil(len(drawn[0].x) / MAX_POINTS)
    traces = [
        {"x": list(one.x[::size]), "y": [_mean(one.y[at : at + size]) for at in range(0, len(one.y), size)],
         "name": one.label, "meta": place, "stackgroup": "all", "mode": "lines",
         "line": {"width": 1, "dash": DASHES[place % len(DASHES)]}, "hovertemplate": "%{y:.3~g}"}
        for place, one in enumerate(drawn)
    ]  # fmt: skip
    return {"data": traces, "layout": _layout(340, from_zero=True, format_y=".3~g")}


def scatter_chart(values: list[str], y: Sequence[float | None], texts: list[str], title: str) -> Figure | None:
    """Return a dot for each value of a setting, on a logarithmic axis where values are numbers far apart."""
    if all(one is None for one in y):
        return None
    layout = _layout(300, format_y=".4~f") | {"hovermode": "closest", "showlegend": False}
    try:
        numbers: list[Any] = [float(value) for value in values]
        spread = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
        layout["xaxis"] = {"type": "log" if spread else "linear", "exponentformat": "power", "nticks": 6}
    except ValueError:
        numbers, layout["xaxis"] = values, {"type": "category"}
    layout["xaxis"] |= {"title": {"text": title}, "automargin": True}
    dots = {"x": numbers, "y": list(y), "text": texts, "mode": "markers", "meta": 0, "marker": {"size": 10},
            "hovertemplate": "%{text}<br>%{y:.4f}<extra></extra>"}  # fmt: skip
    return {"data": [dots], "layout": layout}


def activity_map(periods: list[Period], num_blocks: int, last_step: int) -> Figure | None:
    """Return a map of which block trained when, the last block on top, with each block's share of the steps.

    Many periods are drawn together; a cell is then as strong as the share of its steps that trained the block,
    against the largest share of all cells.
    """
    if not periods or num_blocks == 0:
        return None
    columns = activity_columns(periods, num_blocks, last_step)
    shares = activity_shares(periods, num_blocks, last_step)
    named = [f"steps {start} to {end - 1}" for start, end, _ in columns]
    blocks = list(range(num_blocks))
    cells = {
        "type": "heatmap", "x": [start for start, _, _ in columns] + [columns[-1][1]], "y": blocks,
        "z": [[round(of_blocks[block], 3) for _, _, of_blocks in columns] for block in blocks],
        "text": [named] * num_blocks, "showscale": False, "ygap": 1, "zmin": 0,
        "hovertemplate": "block %{y}, %{text}: trained in %{z:.0%}<extra></extra>",
    }  # fmt: skip
    bars = {
        "type": "bar", "orientation": "h", "x": shares, "y": blocks, "meta": 1, "xaxis": "x2",
        "hovertemplate": "block %{y}: %{x:.1%} of the steps<extra></extra>",
    }  # fmt: skip
    layout = _map_layout(num_blocks)
    layout["xaxis"]["domain"] = [0, 0.8]
    layout["xaxis2"] = {
        "domain": [0.83, 1],
        "tickformat": ".0%",
        "nticks": 2,
        "tickangle": 0,
        "rangemode": "tozero",
        "fixedrange": True,
    }
    return {"data": [cells, bars], "layout": layout}


def norm_map(steps: list[int], norms: list[dict[int, float]], num_blocks: int) -> Figure | None:
    """Return a map of how far each block's weight norm has moved from the first one that is known, in per cent.

    Args:
        steps: where norms were taken, ascending.
        norms: those then known, by block; a block keeps its norm until the next one.
        num_blocks: of the model.
    """
    if not any(norms):
        return None
    first: dict[int, float] = {}
    now: dict[int, float] = {}
    columns = []
    for known in norms:
        now |= known
        first = known | first
        columns.append([(now.get(block), first.get(block)) for block in range(num_blocks)])
    size = math.ceil(len(steps) * num_blocks / MAX_CELLS)
    kept = sorted({*range(0, len(steps), size), len(steps) - 1})
    changes = [
        [None if (pair := columns[at][block])[0] is None or not pair[1] else pair[0] / pair[1] - 1 for at in kept]
        for block in range(num_blocks)
    ]
    largest = max((abs(value) for row in changes for value in row if value is not None), default=0) or 1e-6
    cells = {
        "type": "heatmap", "x": [steps[at] for at in kept], "y": list(range(num_blocks)), "z": changes,
        "customdata": [[columns[at][block][0] for at in kept] for block in range(num_blocks)],
        "colorscale": "RdBu", "zmin": -largest, "zmax": largest, "ygap": 1,
        "colorbar": {"tickformat": ".1%", "thickness": 10, "nticks": 5},
        "hovertemplate": "block %{y}, step %{x}: norm %{customdata:.5~g}, %{z:+.2%}<extra></extra>",
    }  # fmt: skip
    layout = _map_layout(num_blocks)
    layout["xaxis"]["range"] = [steps[0], max(steps[-1], steps[0] + 1)]
    return {"data": [cells], "layout": layout}


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


def _mark_traces(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Return what happened as symbols on the axis, a trace a kind; periods only where they can be told apart."""
    traces = []
    for place, (kind, symbol) in enumerate(SYMBOLS.items()):
        found = [mark for mark in marks if mark.kind == kind]
        if found and (kind != "switch" or len(found) <= MAX_MARKS):
            traces.append(
                {"x": [mark.step for mark in found], "y": [0] * len(found), "text": [mark.text for mark in found],
                 "yaxis": "y2", "mode": "markers", "name": kind, "showlegend": False, "meta": 3 + place,
                 "cliponaxis": False,
                 "marker": {"symbol": symbol, "size": 7 if kind == "switch" else 11},
                 "hovertemplate": "%{text}<extra></extra>"}
            )  # fmt: skip
    return traces


def _layout(height: int, *, from_zero: bool = False, format_y: str = "") -> dict[str, Any]:
    y_axis = {"automargin": True, "rangemode": "tozero" if from_zero else "normal", "tickformat": format_y, "nticks": 6}
    return {
        "height": height, "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "hovermode": "x unified", "yaxis": y_axis,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "step"}, "automargin": True, "tickformat": ",d", "nticks": 6},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }  # fmt: skip


def _map_layout(num_blocks: int) -> dict[str, Any]:
    layout = _layout(round(min(820, max(220, 14 * num_blocks + 70))))
    del layout["yaxis2"]
    layout["yaxis"] = {"title": {"text": "block"}, "automargin": True, "tickformat": "d", "nticks": 12}
    return layout | {"hovermode": "closest", "showlegend": False}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
