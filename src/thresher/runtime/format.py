"""Human-readable counts, sizes, times, rates and shares."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a number of things: "1 row", "2,000 rows"; ``plural`` is for nouns that do not just take an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def size(count: float) -> str:
    """Format a number of bytes: "812 bytes", "1.5 MB", "20.0 GB"."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    """Format a time: "7.3 s" up to 100 seconds, "12 min" up to 100 minutes, then "5.6 h"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:,.1f} h"


def rate(count: float, seconds: float, unit: str = "rows") -> str:
    """Format a rate: "1,234 rows/s", with one decimal below ten."""
    value = count / seconds if seconds > 0 else 0.0
    return f"{value:,.0f} {unit}/s" if value >= 9.95 or value == 0 else f"{value:.1f} {unit}/s"


def percent(part: float, whole: float = 1.0) -> str:
    """Format a share: "12.5%", "-" of a zero whole; never rounds a part to 0% or an incomplete part to 100%."""
    if not whole:
        return "-"
    value = part / whole
    if 0 < value < 0.001:
        return "<0.1%"
    if 0.999 < value < 1:
        return ">99.9%"
    return f"{value:.1%}"


def pace(done: float, total: float, seconds: float, unit: str = "rows") -> str:
    """Format the rate and the remaining time: "1,234 rows/s, ETA 12 min".

    Args:
        done: Units finished in ``seconds``.
        total: Total units, including ``done``.
        seconds: Time spent so far.
        unit: Name of the units.
    """
    if done <= 0 or seconds <= 0:
        return "ETA unknown"
    return f"{rate(done, seconds, unit)}, ETA {duration(max(total - done, 0) * seconds / done)}"
