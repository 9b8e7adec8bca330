"""Sizes, times and rates as people read them."""

from __future__ import annotations

import pytest

from thresher.runtime.format import counted, duration, pace, percent, rate, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (20 * 10**9, "20.0 GB"), (3.21e15, "3,210.0 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (7.26, "7.3 s"), (99.9, "99.9 s"), (99.97, "2 min"), (720, "12 min"), (5969, "99 min"),
        (5970, "1.7 h"), (20_000, "5.6 h"), (10**7, "2,777.8 h"),
    ],
)  # fmt: skip
def test_times(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates_and_shares() -> None:
    assert rate(12_345, 10) == "1,234 rows/s"
    assert rate(30, 20, "pictures") == "1.5 pictures/s"
    assert rate(9.96, 1) == "10 rows/s"
    assert rate(0, 5) == rate(5, 0) == "0 rows/s"
    shares = [percent(0.1256), percent(1, 8), percent(0, 9), percent(3, 3), percent(0, 0)]
    assert shares == [
        "12.6%",
        "12.5%",
        "0.0%",
        "100.0%",
        "-",
    ]
    assert [percent(1, 10**6), percent(10**6 - 1, 10**6)] == ["<0.1%", ">99.9%"]
    assert pace(250, 1000, 10) == "25 rows/s, ETA 30.0 s"
    assert pace(1, 1, 10, "shards") == "0.1 shards/s, ETA 0.0 s"
    assert pace(0, 10, 5) == "ETA unknown"


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(0, ("row",), "0 rows"), (1, ("row",), "1 row"), (2000, ("row",), "2,000 rows"),
     (1, ("class", "classes"), "1 class"), (2, ("class", "classes"), "2 classes")],
)  # fmt: skip
def test_counts(count: int, noun: tuple[str, ...], text: str) -> None:
    assert counted(count, *noun) == text
