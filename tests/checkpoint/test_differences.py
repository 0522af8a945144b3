"""What makes the data of a resume others than those of the checkpoint."""

from __future__ import annotations

from lisa_dist.checkpoint.differences import changed_data


def test_another_order_of_the_same_rows_is_other_data() -> None:
    assert (
        changed_data({"rows": "a"}, {"rows": "a", "group_by_length": False}) == []
    )  # a checkpoint from before the key
    for then in (False, True):
        now = {"rows": "a", "group_by_length": not then}
        assert changed_data({"rows": "a", "group_by_length": then}, now) == ["group_by_length"]


def test_a_day_counts_where_rows_show_it() -> None:
    then = {"rows": "a", "date": "2026-01-31"}
    assert changed_data(then, {"rows": "b", "date": "2026-02-01"}) == ["date"]
    assert changed_data(then, {"rows": "a", "date": "2026-02-01"}) == []
    assert changed_data({"rows": "a"}, {"rows": "a", "date": False}) == []
