"""What was lost: counts are those of a loop over rows, and chance alone is not called a loss."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from thresher import UsageError, from_arrays
from thresher.explore import shares
from thresher.explore.shares import ColumnShares, Share, kept_shares, wilson
from thresher.explore.words import STOP_WORDS
from thresher.pool.store import EmbeddingStore


def pool(table: dict[str, Any], **more: Any) -> EmbeddingStore:
    n = len(next(iter(table.values())))
    return from_arrays(np.random.default_rng(0).standard_normal((n, 4)).astype("f4"), table=table, **more)


def slow_counts(values: list[Any], kept: np.ndarray) -> dict[Any, tuple[int, int]]:
    counts: dict[Any, tuple[int, int]] = {}
    for value, k in zip(values, kept.tolist(), strict=True):
        n, m = counts.get(value, (0, 0))
        counts[value] = n + 1, m + k
    return {value: pair for value, pair in counts.items() if pair[0] >= 5}


def column(found: shares.KeptShares, name: str) -> ColumnShares:
    return next(one for one in found.columns if one.name == name)


def counts(one: ColumnShares) -> dict[Any, tuple[int, int]]:
    return {share.value: (share.rows, share.kept) for share in one.values}


def test_wilson_is_that_of_scipy() -> None:
    from scipy.stats import binomtest

    for n in (1, 2, 7, 100, 12345):
        for k in sorted({0, 1, n // 3, n}):
            for level in (0.95, 0.9999):
                known = binomtest(k, n).proportion_ci(level, method="wilson")
                low, high = wilson(k, n, level)
                assert low == pytest.approx(known.low, abs=1e-12)
                assert high == pytest.approx(known.high, abs=1e-12)
    assert tuple(map(float, wilson(0, 0))) == (0.0, 1.0)


def test_counts_of_texts_bools_and_few_whole_numbers_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    n = 600
    kept = rng.random(n) < 0.4
    table: dict[str, Any] = {
        "licence": [[None, "cc", "<script>alert(1)</script>", "a\u202eb\n", ""][i] for i in rng.integers(0, 5, n)],
        "nsfw": [[True, False, None][i] for i in rng.integers(0, 3, n)],
        "stars": [[1, 2, 5, None][i] for i in rng.integers(0, 4, n)],
        "lang": pa.array([["de", "en"][i] for i in rng.integers(0, 2, n)]).dictionary_encode(),
        "raw": [[b"x", b"y\xff"][i] for i in rng.integers(0, 2, n)],
    }
    found = kept_shares(pool(table), kept)
    assert not found.left_out or set(found.left_out) <= {"raw"}
    assert counts(column(found, "licence")) == slow_counts(table["licence"], kept)
    assert counts(column(found, "lang")) == slow_counts(table["lang"].to_pylist(), kept)
    words = {True: "true", False: "false", None: None}
    assert counts(column(found, "nsfw")) == slow_counts([words[v] for v in table["nsfw"]], kept)
    assert counts(column(found, "stars")) == slow_counts([v if v is None else str(v) for v in table["stars"]], kept)
    for one in found.columns:
        assert (one.rows, one.kept) == (n, int(kept.sum()))
        assert sum(share.rows for share in one.values) == n


def test_numbers_are_counted_in_ranges_with_about_equal_numbers_of_rows() -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(size=1_000)
    values[:50] = np.nan
    values[50:60] = np.inf
    kept = values > 0
    one = column(kept_shares(pool({"score": values}), kept), "score")
    assert one.kind == "number"
    known = [share for share in one.values if share.value is not None]
    assert len(known) == 10
    assert all(80 <= share.rows <= 120 for share in known)
    for share in known:
        assert share.at_least is not None
        assert share.at_most is not None
        inside = (values >= share.at_least) & (values <= share.at_most)
        assert (share.rows, share.kept) == (inside.sum(), (inside & kept).sum())
    assert [share.rows for share in one.values if share.value is None] == [50]


def test_infinite_numbers_are_a_range() -> None:
    n = 400
    values = np.where(np.arange(n) % 4 == 0, np.nan, np.inf)
    both = np.where(np.arange(n) % 2 == 0, -np.inf, np.inf)
    kept = np.arange(n) % 8 < 4
    found = kept_shares(pool({"high": values, "both": both}), kept)
    high = {share.value: (share.rows, share.kept) for share in column(found, "high").values}
    assert high == {"inf": (300, 150), None: (100, 50)}
    assert [(share.value, share.rows, share.kept) for share in column(found, "both").values] == [
        ("-inf to inf", n, int(kept.sum()))
    ]


def test_numbers_that_are_nearly_equal_or_huge_are_told_apart() -> None:
    n = 400
    close = 1 + np.arange(n) * 1e-9
    huge = [2**62 + i for i in range(n)]
    kept = np.arange(n) < n // 2
    found = kept_shares(pool({"close": close, "huge": huge, "same": np.full(n, 0.5)}), kept)
    for name in ("close", "huge"):
        values = [share.value for share in column(found, name).values]
        assert len({*values}) == len(values) >= 1
    assert counts(column(found, "same")).popitem()[1] == (n, n // 2)


def test_dates_are_counted_by_the_unit_that_fits() -> None:
    days = np.datetime64("2023-01-01") + np.arange(700)
    kept = np.arange(700) >= 350
    table = pa.table(
        {
            "taken": pa.array(days),
            "at": pa.array(np.datetime64("2024-05-01T00:00:00", "us") + np.arange(700) * np.timedelta64(60, "s")),
            "old": pa.array([datetime.date(1000 + i, 1, 1) for i in range(700)]),
        }
    )
    found = kept_shares(pool({name: table[name].combine_chunks() for name in table.column_names}), kept)
    by_month = counts(column(found, "taken"))
    assert by_month["2023-02"] == (28, 0)
    assert by_month["2024-02"] == (29, 29)
    assert counts(column(found, "at"))["2024-05-01 03"] == (60, 0)
    assert sum(share.rows for share in column(found, "old").values) == 700
    assert 2 <= len(column(found, "old").values) <= 24


def test_words_are_counted_by_caption() -> None:
    captions = ["the red cat", "red red dog", None, "blue cat"] * 20
    kept = np.tile([True, False, False, True], 20)
    found = kept_shares(pool({"text": captions}), kept)
    one = column(found, "text")
    assert one.kind == "words"
    assert counts(one) == {"red": (40, 20), "cat": (40, 40), "dog": (20, 0), "blue": (20, 20)}
    assert one.values[0].value == "dog"
    assert not STOP_WORDS & {*counts(one)}
    assert not any(c.kind == "words" for c in kept_shares(pool({"text": captions}), kept, words=False).columns)


def test_fewer_captions_are_evenly_spaced_rows() -> None:
    captions = [f"word{i % 7}" for i in range(300)]
    kept = np.arange(300) % 2 == 0
    one = column(kept_shares(pool({"text": captions}), kept, captions=110), "text")
    rows = np.arange(0, 300, 3)  # every third: at most 110
    assert (one.rows, one.kept) == (100, int(kept[rows].sum()))
    assert counts(one) == slow_counts([captions[i] for i in rows], kept[rows])


def test_losses_come_first_and_gains_last() -> None:
    rng = np.random.default_rng(5)
    country = rng.choice(["de", "fr", "jp", "br"], 4_000)
    kept = rng.random(4_000) < np.select([country == "jp", country == "br"], [0.2, 0.7], 0.5)
    found = kept_shares(pool({"country": country.tolist()}), kept)
    values = [share.value for share in found.columns[0].values]
    assert values[0] == "jp"
    assert values[-1] == "br"
    lost, gained = found.most(3)
    assert [share.value for _, share in lost][0] == "jp"
    assert [share.value for _, share in gained][0] == "br"
    for share in found.columns[0].values:
        assert share.low <= share.share <= share.high


def test_sure_differences_that_would_be_shown_as_zero_are_not_shown() -> None:
    values = tuple(Share(str(shift), 1000, 500, shift=shift) for shift in (-0.2, -0.0004, 0.0, 0.0004, 0.001))
    lost, gained = shares.KeptShares((ColumnShares("a", "text", values, 5000, 2500),), 5, {}).most(9)
    assert [[share.value for _, share in pairs] for pairs in (lost, gained)] == [["-0.2"], ["0.001"]]


def test_chance_alone_is_no_loss() -> None:
    """Of 20 selections by chance with 600 comparisons each, about one may have a value that seems different."""
    wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = {f"c{i}": rng.integers(0, 60, 3_000).astype(str).tolist() for i in range(10)}
        found = kept_shares(pool(table), rng.random(3_000) < 0.3)
        assert found.comparisons == 600
        wrong += any(share.shift for one in found.columns for share in one.values)
        naive = sum(not share.low <= one.share <= share.high for one in found.columns for share in one.values)
        assert naive > 5  # what one would see without the correction
    assert wrong <= 4


def test_chance_alone_is_no_gain_of_rare_values_when_few_rows_are_kept() -> None:
    """Where 1% is kept, one row of five is nothing: Wilson's interval alone finds such values in every selection."""
    wrong = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = {f"c{i}": rng.integers(0, 300, 3_000).astype(str).tolist() for i in range(4)}
        found = kept_shares(pool(table), rng.random(3_000) < 0.01)
        wrong += any(share.differs for one in found.columns for share in one.values)
    assert wrong <= 4
    kept = np.arange(3_000) % 100 == 0
    kept[:10] = True
    site = ["rare" if row < 10 else f"s{row % 7}" for row in range(3_000)]
    rare = next(one for one in column(kept_shares(pool({"site": site}), kept), "site").values if one.value == "rare")
    assert rare.differs, "10 of 10 where 1% are kept is no chance"


def test_a_whole_number_is_in_one_range_only() -> None:
    numbers = np.arange(100, 500)
    one = column(kept_shares(pool({"width": numbers.tolist()}), numbers % 2 == 0), "width")
    ranges = sorted((share.at_least, share.at_most, share.value) for share in one.values if share.at_least is not None)
    assert [value for *_, value in ranges] == [f"{low:.0f} to {high:.0f}" for low, high, _ in ranges]
    assert all(low == before + 1 for (_, before, _), (low, *_) in zip(ranges, ranges[1:], strict=False))


def test_tails_are_those_of_scipy() -> None:
    from scipy.stats import binom

    for rows in (1, 5, 26, 900, 30_000):
        for share in (0.0025, 0.01, 0.4, 0.99):
            for kept in sorted({0, 1, int(rows * share), min(rows, int(rows * share) + 9), rows}):
                many = kept >= share * rows
                known = binom.sf(kept - 1, rows, share) if many else binom.cdf(kept, rows, share)
                assert shares.tail(kept, rows, share) == pytest.approx(known, rel=1e-6, abs=1e-300)


def test_a_column_of_many_values_is_counted_exactly_for_frequent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_HELD", 20)
    rng = np.random.default_rng(6)
    site = np.array([f"site{int(i)}" for i in rng.zipf(1.5, 5_000) % 400])
    kept = rng.random(5_000) < 0.5
    one = column(kept_shares(pool({"site": site.tolist()}), kept), "site")
    slow = slow_counts(site.tolist(), kept)
    assert one.others is None
    for share in one.values[:30]:
        assert slow[share.value] == (share.rows, share.kept)
    frequent = sorted(slow, key=lambda value: -slow[value][0])[:5]
    assert set(frequent) <= {share.value for share in one.values}


def test_columns_that_cannot_be_counted_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_HELD", 20)
    n = 200
    table = {"url": [f"https://example.com/{i}" for i in range(n)], "tags": [["a", "b"]] * n, "box": [{"x": 1}] * n}
    found = kept_shares(pool(table), np.arange(n) < 50)
    assert found.columns == ()
    assert set(found.left_out) == {"url", "tags", "box"}
    assert found.left_out["url"] == "almost every row has its own value"
    with pytest.raises(UsageError, match="needs the metadata column 'nothing'"):
        kept_shares(pool(table), np.arange(n) < 50, ["nothing"])


def test_very_long_values_are_cut() -> None:
    values = ["x" * 100_000, "y"] * 10
    one = column(kept_shares(pool({"c": values}), np.arange(20) < 10), "c")
    assert {len(share.value or "") for share in one.values} == {shares.TEXT, 1}


def test_pools_without_metadata_and_without_rows_kept() -> None:
    store = from_arrays(np.eye(8, dtype="f4"))
    assert kept_shares(store, np.ones(8, bool)).columns == ()
    found = kept_shares(pool({"a": ["x"] * 9, "empty": [None] * 9}), np.zeros(9, bool))
    assert counts(column(found, "a")) == {"x": (9, 0)}
    assert Share(None, 0, 0).share != Share(None, 0, 0).share
