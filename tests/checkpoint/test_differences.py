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
