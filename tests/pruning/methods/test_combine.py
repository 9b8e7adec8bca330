from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher import BadRowsError, UsageError, build
from thresher.pruning.methods.combine import ranks, weighted, zscores


def slow_ranks(values) -> list[float]:
    n = len(values)
    return [
        (sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2) / max(n - 1, 1)
        for value in values
    ]


@given(st.lists(st.sampled_from([-3.5, -0.0, 0.0, 1.0, 2.0, 1e300, float("inf")]), min_size=1, max_size=30))
def test_equal_values_share_their_mean_rank(values) -> None:
    found = ranks(np.array(values))
    np.testing.assert_allclose(found, slow_ranks(values), atol=1e-12)
    assert 0 <= found.min() <= found.max() <= 1


@given(st.lists(st.floats(-1e200, 1e200, allow_subnormal=False), min_size=2, max_size=30))
def test_zscores_have_mean_0_and_spread_1(values) -> None:
    found = zscores(np.array(values))
    if min(values) == max(values):
        assert found.tolist() == [0.0] * len(values)
        return
    assert abs(found.mean()) < 1e-6
    assert found.std() == pytest.approx(1, abs=1e-6)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


@pytest.mark.parametrize("value", [0.1, -7.0, 1e-30, 3])
def test_a_constant_column_says_nothing(value) -> None:
    assert zscores(np.full(37, value)).tolist() == [0.0] * 37
    assert ranks(np.full(37, value)).tolist() == [0.5] * 37 or len(set(ranks(np.full(37, value)))) == 1


def test_the_syntax() -> None:
    assert weighted("clip-score") == {"clip-score": 1.0}
    assert weighted(" clip-score=1, s.parquet:a b = 0.5 ,width=-2e1") == {
        "clip-score": 1.0,
        "s.parquet:a b": 0.5,
        "width": -20.0,
    }
    assert weighted("part=3/x.parquet=0, b") == {"part=3/x.parquet": 0.0, "b": 1.0}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("", "names no column"),
        ("a,,b", "names no column"),
        ("=1", "names no column"),
        ("a=much", "weight 'much' of a is not a finite number"),
        ("a=", "weight '' of a"),
        ("a=nan", "weight 'nan'"),
        ("a=inf, b", "weight 'inf'"),
        ("part=3/x.parquet", "weight '3/x.parquet' of part"),
        ("a=0, b=0.0", "all weights are zero"),
        ("a, b, a=2", "names a twice"),
    ],
)
def test_columns_that_make_no_score(columns, message) -> None:
    with pytest.raises(UsageError, match=message):
        build("combine", {"columns": columns, "keep": "50%"})


@pytest.mark.parametrize("by", ["rank", "zscore"])
def test_the_weighted_sum(pool, rows, select, by) -> None:
    rng = np.random.default_rng(0)
    image, text = rows(90, seed=1), rows(90, seed=2)
    width, aesthetic = rng.integers(100, 105, 90), rng.normal(5, 1, 90)
    store = pool(image, text, {"width": width, "aesthetic": aesthetic})
    cosine = (image.astype(float) * text).sum(axis=1)
    selection = select(
        store, build("combine", {"columns": "clip-score=2, aesthetic, width=-0.5", "by": by, "keep": 30})
    )
    parts = {"clip": cosine.astype(np.float32), "width": width, "aesthetic": aesthetic}
    scaled = {
        name: np.array(slow_ranks(v)) if by == "rank" else (v - np.mean(v, dtype=float)) / np.std(v, dtype=float)
        for name, v in parts.items()
    }
    expected = 2 * scaled["clip"] + scaled["aesthetic"] - 0.5 * scaled["width"]
    np.testing.assert_allclose(selection.steps[0].rows["score"], expected, atol=1e-4)
    best = sorted(range(90), key=lambda i: (-expected[i], i))[:30]
    assert len(set(selection.rows()) & set(best)) >= 29  # two rows may be alike to the last digit of a float32
    assert selection.steps[0].notes == (
        "weight 2: clip-score: computed from the image and text embeddings",
        "weight 1: taken from the column aesthetic",
        "weight -0.5: taken from the column width",
    )


def test_only_the_rows_given_count(pool, select) -> None:
    store = pool(None, None, {"a": [1.0, 2.0, 3.0, 100.0], "b": [4.0, 3.0, 1.0, 1000.0]})
    some = select(store, build("filter", {"where": "a < 50"}))
    found = select(store, build("combine", {"columns": "a, b=0.25", "keep": 1}), within=some)
    assert found.steps[1].rows["score"].tolist() == [0.25, 0.625, 1.0]


def test_infinite_values_have_a_rank_but_no_z_score(pool, select) -> None:
    store = pool(None, None, {"a": [1.0, float("inf"), 3.0], "b": [1.0, 2.0, 3.0]})
    assert select(store, build("combine", {"columns": "a", "keep": 1})).rows().tolist() == [1]
    with pytest.raises(BadRowsError, match="columns: a is infinite in row 1"):
        select(store, build("combine", {"columns": "b, a", "by": "zscore", "keep": 1}))
    with pytest.raises(UsageError, match="combine needs columns"):  # of the combine named as a column
        select(store, build("combine", {"columns": "combine", "keep": 1}))
