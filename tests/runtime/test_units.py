import pytest

from lisa_dist.runtime.units import format_bytes, format_count, format_duration, format_ranges


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (0.1234, "0.123"), (12_345, "12.3 k"), (1_236_000_000, "1.24 B"), (69e9, "69 B")],
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512 B"), (1536 * 1024, "1.5 MiB"), (16.7 * 1024**3, "16.7 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.21, "4.2 s"),
        (42.0, "42 s"),
        (185, "3 min 05 s"),
        (1560, "26 min"),
        (7800, "2 h 10 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([1, 2], "1, 2"), ([0, 1, 2, 3, 7], "0-3, 7"), ([1, 3, 4, 5], "1, 3-5")]
)
def test_ranges(indices, text):
    assert format_ranges(indices) == text
