"""NaN counts as a missing value in a filter: no comparison with it is true, and it is counted."""

from __future__ import annotations

import math
import random

import numpy as np
import pyarrow as pa
import pytest

from thresher import UsageError, build
from thresher.pruning.condition import Condition
from thresher.pruning.database import cursor

NAN, INF = math.nan, math.inf
VALUES = [NAN, 0.0, 0.5, -1.0, INF, -INF, None, 1.0]
PAIRS = [(a, b) for a in VALUES for b in VALUES]
PART = pa.record_batch({"a": pa.array([a for a, _ in PAIRS], pa.float32()), "b": pa.array([b for _, b in PAIRS])})
FINITE = pa.record_batch(
    {"a": pa.array([0.5, -1.0, None] * 3, pa.float32()), "b": [0.5, 1.0, 0.5, None, 0, 2, 1, 1, 3]}
)


def evaluate(where, part):
    with cursor() as db:
        codes, missing = Condition.parse(where).query(db, part.schema).run(db, part)
    return np.flatnonzero(codes == 0).tolist(), missing


def number(x):
    return None if x is None or x != x else x


def compare(operator, x, y):
    x, y = number(x), number(y)
    if x is None or y is None:
        return None
    return {"<": x < y, ">": x > y, "<=": x <= y, ">=": x >= y, "=": x == y, "<>": x != y}[operator]


def both(x, y):
    return False if x is False or y is False else None if None in (x, y) else True


def negated(x):
    return None if x is None else not x


def either(x, y):
    return negated(both(negated(x), negated(y)))


def computed(operator, x, y):
    x, y = number(x), number(y)
    if x is None or y is None:
        return None
    with np.errstate(all="ignore"):
        return float({"+": np.add, "-": np.subtract, "*": np.multiply}[operator](np.float64(x), np.float64(y)))


def random_number(draw, depth):
    """Return SQL of a number, and the function of a row that computes it."""
    kind = draw.randrange(7 if depth else 3)
    if kind < 2:
        return "ab"[kind], lambda row: number(row[kind])
    if kind == 2:
        constant = draw.choice([0.5, -1.0, 2.0])
        return f"{constant}::DOUBLE", lambda row: constant
    (s, f), (t, g) = random_number(draw, depth - 1), random_number(draw, depth - 1)
    if kind in (3, 4):
        operator = draw.choice("+-*")
        return f"({s} {operator} {t})", lambda row: computed(operator, f(row), g(row))
    if kind == 5:
        c, h = random_condition(draw, depth - 1)
        return f"(CASE WHEN {c} THEN {s} ELSE {t} END)", lambda row: f(row) if h(row) is True else g(row)
    return f"coalesce({s}, {t})", lambda row: next((x for x in (number(f(row)), number(g(row))) if x is not None), None)


def random_condition(draw, depth):
    """Return SQL of a condition, and the function of a row that evaluates it."""
    kind = draw.randrange(9 if depth else 5)
    below = max(depth - 1, 0)
    (s, f), (t, g) = random_number(draw, below), random_number(draw, below)
    if kind < 2:
        operator = draw.choice(["<", ">", "<=", ">=", "=", "<>"])
        return f"({s} {operator} {t})", lambda row: compare(operator, f(row), g(row))
    if kind == 2:
        return f"({s} IS NULL)", lambda row: number(f(row)) is None
    if kind == 3:
        return (
            f"({s} BETWEEN {t} AND 1::DOUBLE)",
            lambda row: both(compare(">=", f(row), g(row)), compare("<=", f(row), 1)),
        )
    if kind == 4:
        return f"({s} IN ({t}, 0.5))", lambda row: either(compare("=", f(row), g(row)), compare("=", f(row), 0.5))
    (c, h), (d, j) = random_condition(draw, depth - 1), random_condition(draw, depth - 1)
    if kind == 5:
        return f"(NOT {c})", lambda row: negated(h(row))
    if kind == 6:
        return f"({c} AND {d})", lambda row: both(h(row), j(row))
    if kind == 7:
        return f"({c} OR {d})", lambda row: either(h(row), j(row))
    return f"({s} IS DISTINCT FROM {t})", lambda row: number(f(row)) != number(g(row))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_it_is_three_valued_logic_row_by_row(seed) -> None:
    draw = random.Random(seed)
    for _ in range(15):
        where, holds = random_condition(draw, 3)
        for part in (PART, FINITE):
            rows = list(zip(*part.to_pydict().values(), strict=True))
            expected = [i for i, row in enumerate(rows) if holds(row) is True]
            assert evaluate(where, part)[0] == expected, where


SIMILARITY = [NAN, 0.1, None, 0.3, NAN, INF, -INF, 0.2]


@pytest.mark.parametrize(
    ("where", "kept", "counted"),
    [
        ("similarity > 0.25", [3, 5], 2),
        ("NOT (similarity > 0.25)", [1, 6, 7], 2),
        ("NOT similarity <= 0.25", [3, 5], 2),
        ("similarity <> 0.3", [1, 5, 6, 7], 2),
        ("similarity = similarity", [1, 3, 5, 6, 7], 2),
        ("similarity BETWEEN 0 AND 1", [1, 3, 7], 2),
        ("similarity NOT BETWEEN 0 AND 1", [5, 6], 2),
        ("similarity NOT IN (0.3, 7)", [1, 5, 6, 7], 2),
        ("similarity IS NULL", [0, 2, 4], 2),
        ("similarity IS NOT NULL", [1, 3, 5, 6, 7], 2),
        ("similarity > 0.25 OR true", range(8), 2),
        ("isnan(similarity)", [0, 4], 0),
        ("NOT isnan(similarity)", [1, 3, 5, 6, 7], 0),
        ("isfinite(similarity)", [1, 3, 7], 0),
        ("isnan(similarity) OR similarity > 0.25", [0, 3, 4, 5], 2),
        ("similarity - similarity >= 0", [1, 3, 7], 2),  # inf - inf
        ("pow(similarity, 0) = 1", [1, 3, 5, 6, 7], 2),
        ("greatest(similarity, 0) > 0.25", [3, 5], 2),
        ("coalesce(similarity, 0) > 0.25", [3, 5], 2),
        ("list_max([similarity, 0]) > 0.25", [3, 5], 2),
        ("CASE WHEN similarity > 0.25 THEN true ELSE false END", [3, 5], 2),
        ("CASE WHEN similarity THEN true ELSE false END", [1, 3, 5, 6, 7], 2),
        ("similarity::BOOLEAN", [1, 3, 5, 6, 7], 2),
        ("similarity::VARCHAR <> '0.1'", [3, 5, 6, 7], 2),
        ("similarity OR false", [1, 3, 5, 6, 7], 2),
        ("TRY_CAST(text AS DOUBLE) > 0.25", [3, 5], 0),
        ("text::DOUBLE > 0.25", [3, 5], 0),
        ("s.a > 0.25", [3, 5], 2),
        ("s['a'] > 0.25", [3, 5], 2),
        ("l[1] > 0.25", [3, 5], 2),
        ("m['k'][1] > 0.25 OR m['k'] > 0.25", [3, 5], 2),
        ("half > 0.25", [3, 5], 2),
        ("whole > 1", [1, 2], 0),
    ],
)
@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.dictionary(pa.int32(), pa.float64())])
def test_nan_is_missing_and_is_counted(where, kept, counted, kind) -> None:
    values = pa.array(SIMILARITY, pa.float64(), from_pandas=False)
    part = pa.record_batch(
        {
            "similarity": values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind),
            "text": pa.array([None if x is None else str(x) for x in SIMILARITY]),
            "s": pa.StructArray.from_arrays([values], ["a"]),
            "l": pa.ListArray.from_arrays(pa.array(range(9), pa.int32()), values),
            "m": pa.MapArray.from_arrays(pa.array(range(9), pa.int32()), pa.array(["k"] * 8), values),
            "half": values.cast(pa.float16()),
            "whole": [0, 2, 3, None, 0, 0, 0, 0],
        }
    )
    if "m[" in where:
        where = "m['k'] > 0.25"
    rows, missing = evaluate(where, part)
    assert rows == list(kept)
    assert sum(missing.values()) == counted


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("similarity < 'nan'", "isnan"),
        ("similarity IN (1, ' NaN ')", "isnan"),
        ("l = [0.5]", "compare single values"),
        ("(similarity, 1) > (0.2, 0)", "compare single values"),
        ("(similarity, 1) = (0.2::DOUBLE, 1)", "compare single values"),
        ("similarity", "not true or false"),
    ],
)
def test_comparisons_that_would_hide_nan_are_refused(where, message) -> None:
    part = pa.record_batch({"similarity": [0.5, NAN], "l": [[0.5], [NAN]]})
    with pytest.raises(UsageError, match=message):
        evaluate(where, part)
    assert evaluate("text = 'nan'", pa.record_batch({"text": ["nan", "a"]}))[0] == [0]


def test_the_selection_says_how_many_rows_are_nan(pool, select) -> None:
    similarity = np.array([0.1, 0.5, NAN, 0.9, NAN, NAN], np.float32)
    store = pool(
        None,
        None,
        {"uid": list("abcdef"), "similarity": similarity, "width": [1, 2, 3, 4, 5, 6]},
        parquet=True,
        files=2,
    )
    for _ in range(2):  # the second time from the cache
        step = select(store, build("filter", {"where": "similarity > 0.2 AND width < 6"})).steps[0]
        assert step.rows["code"].tolist() == [1, 0, 1, 0, 1, 1]
        assert step.notes == (
            "3 rows have no number (NaN) in similarity, which counts as missing: no comparison with it is true",
        )
    assert select(store, build("filter", {"where": "width < 4"})).steps[0].notes == ()
    assert select(store, build("filter", {"where": "isnan(similarity)"})).rows().tolist() == [2, 4, 5]


def test_files_of_one_pool_may_have_other_types(tmp_path, select) -> None:
    import pyarrow.parquet as pq

    from thresher import open_store

    (tmp_path / "pool").mkdir()
    for i, column in enumerate([pa.array([1, 5]), pa.array([NAN, 5.0]), pa.array([1, None], pa.float32())]):
        table = pa.table({"uid": [f"{i}a", f"{i}b"], "score": column})
        pq.write_table(table, tmp_path / "pool" / f"{i}.parquet")
    step = select(open_store(str(tmp_path / "pool")), build("filter", {"where": "score > 2"})).steps[0]
    assert step.rows["code"].tolist() == [1, 0, 1, 0, 1, 1]
    assert step.notes[0].startswith("1 row has no number (NaN) in score")
