"""Numbers as people read them."""

from __future__ import annotations

GIB = 1024**3


def format_count(number: float) -> str:
    """Return ``950``, ``12.3 k``, ``1.24 B``."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {suffix}" if number / size < 1000 else f"{number / size:.0f} {suffix}"
    return f"{number:.0f}" if number == int(number) else f"{number:.3g}"


def format_bytes(number: float) -> str:
    """Return ``512 B``, ``1.5 MiB``, ``16.7 GiB``."""
    for size, suffix in ((1024**4, "TiB"), (GIB, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if abs(number) >= size:
            return f"{number / size:.1f} {suffix}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """Return ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 04 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def format_ranges(indices: list[int]) -> str:
    """Return sorted indices with runs drawn together: ``0-3, 7``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in parts)
