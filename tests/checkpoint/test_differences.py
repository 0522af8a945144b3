"""What makes the data of a resume others than those of the checkpoint."""

from __future__ import annotations

from pathlib import Path

from lisa_dist.checkpoint.differences import changed_data, table_of
from lisa_dist.checkpoint.restore import place_in_data
from lisa_dist.checkpoint.state import Progress
from lisa_dist.config import Config


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


def test_a_threshold_that_nothing_is_measured_by_again_is_noted() -> None:
    assert "sampler.threshold: outliers were measured" in table_of([("sampler.threshold", "13.0", "2.0")])


def test_losses_of_other_data_measure_no_spike(tmp_path: Path) -> None:
    config = Config()
    config.checkpoint.new_data = True
    before = Progress(step=4, sequences=16, recent_losses=[1.0] * 4, data={"rows": "a"})
    progress = place_in_data(before, tmp_path, {"rows": "b"}, config)
    assert (progress.step, progress.sequences, progress.recent_losses) == (4, 0, [])
    assert place_in_data(before, tmp_path, {"rows": "a"}, config) == before
