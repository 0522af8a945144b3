import math

import pytest

from lisa_dist.telemetry.reports.charts import (
    MAX_MARKS,
    MAX_POINTS,
    Mark,
    Period,
    Series,
    activity_columns,
    activity_map,
    activity_shares,
    line_chart,
    moving_average,
    norm_map,
    scatter_chart,
    stacked_chart,
    thin,
)


def test_a_line_has_its_points_and_gaps_a_colour_and_a_dash_of_its_own():
    one, two = Series("loss", [1, 2, 3], [4.0, None, 2.0]), Series("eval", [3], [2.5])
    first, second = line_chart([one, two, Series("empty", [1], [None])])["data"]
    assert (first["x"], first["y"], first["mode"]) == ([1, 2, 3], [4.0, None, 2.0], "lines")
    assert second["mode"] == "lines+markers", "a lone point is no line"
    assert first["meta"] != second["meta"] and first["line"]["dash"] != second["line"]["dash"]


def test_nothing_to_draw_is_no_chart():
    assert line_chart([]) is line_chart([Series("loss", [1, 2], [None, math.nan])]) is None
    assert activity_map([], 4, 10) is stacked_chart([Series("a", [1], [0.0])]) is norm_map([1], [{}], 2) is None
    assert scatter_chart(["1"], [None], [""], "lr") is None


def test_what_happened_is_marked_and_told_but_periods_only_where_they_can_be_told_apart():
    happened = [Mark(5, "resume", "went on"), Mark(7, "fault", "not finite"), Mark(1, "switch", "blocks 3")]
    chart = line_chart([Series("loss", [0, 10], [1.0, 2.0])], marks=happened)
    told = {trace["name"]: (trace["x"], trace["text"]) for trace in chart["data"][1:]}
    assert told == {"resume": ([5], ["went on"]), "fault": ([7], ["not finite"]), "switch": ([1], ["blocks 3"])}
    assert [shape["x0"] for shape in chart["layout"]["shapes"]] == [5, 7]
    many = [Mark(step, "switch", "") for step in range(MAX_MARKS + 1)]
    assert len(line_chart([Series("loss", [0, 10], [1.0, 2.0])], marks=many)["data"]) == 1


def test_thinning_keeps_spikes_and_order():
    values = [1.0] * 10_000
    values[4321] = 50.0
    x, y = thin(range(10_000), values)
    assert len(x) <= MAX_POINTS and x == sorted(x)
    assert max(y) == 50.0 and x[y.index(50.0)] == 4321


def test_stacked_parts_of_many_steps_are_means_of_pieces():
    steps = list(range(4 * MAX_POINTS))
    [trace] = stacked_chart([Series("forward", steps, [1.0, 3.0, None, 2.0] * MAX_POINTS), Series("no", steps, [])])[
        "data"
    ]
    assert len(trace["x"]) == MAX_POINTS and set(trace["y"]) == {2.0} and trace["x"][1] == 4


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


def test_the_map_has_every_block_and_its_share():
    cells, bars = activity_map([Period(1, [0, 2]), Period(5, [1])], num_blocks=4, last_step=8)["data"]
    assert cells["x"] == [1, 5, 9] and cells["z"] == [[1, 0], [0, 1], [1, 0], [0, 0]]
    assert (bars["y"], bars["x"]) == ([0, 1, 2, 3], [0.5, 0.5, 0.5, 0])
    assert activity_map([Period(1, [])], num_blocks=2, last_step=3)["data"][0]["z"] == [[0], [0]]


def test_a_block_keeps_its_norm_until_it_is_measured_again():
    [cells] = norm_map([0, 20, 40], [{0: 10.0}, {0: 11.0, 2: 4.0}, {2: 3.0}], num_blocks=3)["data"]
    assert cells["x"] == [0, 20, 40] and cells["customdata"] == [[10, 11, 11], [None] * 3, [None, 4, 3]]
    assert cells["z"][0] == pytest.approx([0, 0.1, 0.1]) and cells["z"][2] == [None, 0, -0.25]
    assert (cells["zmin"], cells["zmax"]) == (-0.25, 0.25)


def test_a_varied_setting_is_on_a_logarithmic_axis_where_it_spans_tens_and_names_are_categories():
    def axis(*values: str) -> str:
        return scatter_chart(list(values), [1.0] * len(values), [""] * len(values), "key")["layout"]["xaxis"]["type"]

    assert (axis("1e-5", "1e-4"), axis("1", "2"), axis("0", "5"), axis("uniform", "2")) == (
        "log", "linear", "linear", "category",
    )  # fmt: skip
