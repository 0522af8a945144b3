import math
import re
from xml.etree import ElementTree

import pytest

from lisa_dist.telemetry.reports.plots import (
    MAX_POINTS,
    Period,
    Series,
    activity_columns,
    activity_heatmap,
    activity_shares,
    line_chart,
    moving_average,
    thin,
    tick_label,
    ticks,
)


def drawing(html):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, re.DOTALL).group())


def classes(html, tag):
    return [element.get("class") for element in drawing(html).iter(tag)]


def points(html):
    return [line.get("points").split() for line in drawing(html).iter("polyline")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1.2, 3.4, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]),
        (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
        (0, 12.5, [0, 2.5, 5, 7.5, 10, 12.5]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_ticks_around_a_single_value():
    positions = ticks(3.0, 3.0, 5)
    assert positions[0] < 3.0 < positions[-1]
    assert len(ticks(0.0, 0.0, 5)) > 2


def test_tick_labels_have_the_digits_they_need():
    assert [tick_label([0, 2, 4])(value) for value in (0, 2)] == ["0", "2"]
    assert [tick_label([0, 0.5, 1.0])(value) for value in (0, 0.5)] == ["0.0", "0.5"]
    assert tick_label([0, 0.25, 0.5])(0.25) == "0.25"
    assert tick_label([0, 2.5, 5])(7.5) == "7.5"
    assert tick_label([0, 5e-6, 1e-5])(5e-6) == "5e-06"


def test_a_line_follows_its_points():
    [line] = points(line_chart([Series("loss", [0, 5, 10], [4.0, 0.0, 2.0])]))
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in line]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 > y2 > y0  # downwards on the page
    assert (y1 - y2) * 2 == pytest.approx(y1 - y0, abs=0.3)


def test_gaps_split_the_line_and_a_lone_point_becomes_a_dot():
    html = line_chart([Series("loss", range(6), [1.0, 2.0, None, 4.0, math.nan, 3.0])])
    assert [len(line) for line in points(html)] == [2]
    assert len(classes(html, "circle")) == 2
    assert len(classes(line_chart([Series("loss", [1], [2.0])]), "circle")) == 1


def test_nothing_to_draw_says_so():
    assert "nothing recorded" in line_chart([Series("loss", [1, 2], [None, None])])
    assert "nothing recorded" in line_chart([])
    assert "no period" in activity_heatmap([], 4, 10)


def test_a_legend_only_for_several_lines_and_labels_are_escaped():
    one, two = Series("<a>", [1, 2], [1.0, 2.0]), Series("b & c", [1, 2], [2.0, 3.0])
    assert "legend" not in line_chart([one])
    html = line_chart([one, two])
    assert "&lt;a&gt;" in html and "b &amp; c" in html and "<a>" not in html
    assert classes(html, "polyline") == ["line color0", "line color1"]


def test_marks_are_drawn_where_a_run_went_on():
    html = line_chart([Series("loss", [0, 10], [1.0, 2.0])], marks=[5, 99])
    assert classes(html, "line").count("mark") == 1


def test_thinning_keeps_spikes_and_order():
    values = [1.0] * 10_000
    values[4321] = 50.0
    x, y = thin(range(10_000), values)
    assert len(x) <= MAX_POINTS and x == sorted(x)
    assert max(y) == 50.0 and x[y.index(50.0)] == 4321


def test_moving_average_is_corrected_at_the_start_and_keeps_gaps():
    smoothed = moving_average([4.0, None, 4.0, 0.0], half_life=1)
    assert smoothed[:3] == [4.0, None, 4.0]
    # weights by age with half-life 1: 1/8, 1/4, 1/2, whose sum is 7/8
    assert smoothed[3] == pytest.approx((4 / 8 + 4 / 4 + 0 / 2) / (7 / 8))


def test_columns_hold_the_share_of_the_steps():
    periods = [Period(1, [0, 1]), Period(5, [1]), Period(7, [2])]
    assert activity_columns(periods, 3, last_step=10) == [
        (1, 5, [1.0, 1.0, 0.0]),
        (5, 7, [0.0, 1.0, 0.0]),
        (7, 11, [0.0, 0.0, 1.0]),
    ]
    assert activity_shares(periods, 3, last_step=10) == pytest.approx([0.4, 0.6, 0.4])


def test_many_periods_are_drawn_together():
    periods = [Period(1 + 2 * index, [index % 100]) for index in range(1000)]
    columns = activity_columns(periods, 100, last_step=2000)
    assert len(columns) <= 60
    assert all(sum(shares) == pytest.approx(1) for _, _, shares in columns)
    assert activity_shares(periods, 100, last_step=2000) == pytest.approx([0.01] * 100)


def test_the_heatmap_has_a_cell_for_each_active_block_and_a_bar_for_each_block():
    html = activity_heatmap([Period(1, [0, 2]), Period(5, [1])], num_blocks=4, last_step=8)
    assert classes(html, "rect").count("cell") == 3
    assert classes(html, "rect").count("share") == 4
    titles = [title.text for title in drawing(html).iter("title")]
    assert titles == ["block 0: 50% of the steps", "block 1: 50% of the steps", "block 2: 50% of the steps",
                      "block 3: 0% of the steps"]  # fmt: skip


def test_a_run_in_which_no_block_trained():
    assert classes(activity_heatmap([Period(1, [])], num_blocks=2, last_step=3), "rect").count("cell") == 0
