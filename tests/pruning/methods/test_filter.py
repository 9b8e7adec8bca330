from __future__ import annotations

import pytest

from thresher import UsageError, build

CAPTIONS = [
    "a cat", "two  spaced words", "", "   ", None, "tab\tand\nnewline", "\tindented words", "trailing \n",
    "{braces} {0}", "quote ' and \" mark", "日本 語", "👩‍👩‍👧 family", "non\u00a0breaking space", "semi; -- comment",
    "%s \\s \\",
]  # fmt: skip
WIDTHS = [200, 640, None, 0, 199, 1000, 300, None, 5, 10_000, 256, 512, 200, 90, 700]
HEIGHTS = [600, 480, 300, 0, 800, None, 901, None, 0, 200, 256, 170, 601, 30, 200]
LANGUAGES = ["en", "EN", None, "de", "en"] * 3
TABLE = {"text": CAPTIONS, "original_width": WIDTHS, "original_height": HEIGHTS, "Language": LANGUAGES}


def words(t):
    return None if t is None else len(t.split())


def ratio(w, h):
    return None if not w or not h else max(w, h) / min(w, h)


def both(function, *values):
    """SQL's way with missing values: unknown."""
    return None if None in values else function(*values)


# condition -> the same in Python, one function a clause; None is "unknown", which drops the row
CONDITIONS = {
    "words(text) > 1": [lambda t, w, h, g: both(lambda n: n > 1, words(t))],
    "characters(text) > 5": [lambda t, w, h, g: both(lambda t: len(t) > 5, t)],
    "words(text) = 0 OR original_width < 200": [
        lambda t, w, h, g: True if words(t) == 0 or (w is not None and w < 200) else both(lambda *_: False, t, w)
    ],
    "aspect(original_width, original_height) <= 3": [lambda t, w, h, g: both(lambda r: r <= 3, ratio(w, h))],
    "least(original_width, original_height) >= 200": [lambda t, w, h, g: both(lambda w, h: min(w, h) >= 200, w, h)],
    "greatest(original_width, original_height) < 700": [lambda t, w, h, g: both(lambda w, h: max(w, h) < 700, w, h)],
    "original_width IS NULL": [lambda t, w, h, g: w is None],
    "NOT (original_width > 300)": [lambda t, w, h, g: both(lambda w: not w > 300, w)],
    "language IN ('en', 'de') AND original_height BETWEEN 100 AND 600 AND text LIKE '%s%'": [
        lambda t, w, h, g: both(lambda g: g in ("en", "de"), g),
        lambda t, w, h, g: both(lambda h: 100 <= h <= 600, h),
        lambda t, w, h, g: both(lambda t: "s" in t, t),
    ],
}


@pytest.fixture
def store(pool):
    return pool(None, None, TABLE, parquet=True)


@pytest.mark.parametrize("where", CONDITIONS)
def test_it_is_the_condition_row_by_row(store, select, where) -> None:
    failed = {}
    for row, values in enumerate(zip(*TABLE.values(), strict=True)):
        failed |= {row: next((n for n, holds in enumerate(CONDITIONS[where]) if not holds(*values)), None)}
    selection = select(store, build("filter", {"where": where}))
    kept = [row for row, clause in failed.items() if clause is None]
    assert selection.rows().tolist() == kept
    assert 0 < len(kept) < 15
    assert selection.steps[0].rows["code"].tolist() == [0 if n is None else n + 1 for n in failed.values()]


def test_the_reason_names_the_clause_that_failed_first(store, select) -> None:
    selection = select(store, build("filter", {"where": "text <> '{braces} {0}' AND (original_width > 100 OR false)"}))
    told = {row: selection.steps[0].why(row) for row in range(15) if not selection.mask()[row]}
    assert told[8].startswith("fails: ")
    assert "'{braces} {0}'" in told[8]
    assert "original_width > 100" in told[13]
    assert set(told) == {2, 3, 4, 7, 8, 13}


def test_it_sees_only_the_rows_it_was_given(store, select) -> None:
    first = build("filter", {"where": "original_width >= 200"})
    second = build("filter", {"where": "original_height <= 600"})
    selection = select(store, first, second)
    both_at_once = select(store, build("filter", {"where": "original_width >= 200 AND original_height <= 600"}))
    assert selection.mask().tolist() == both_at_once.mask().tolist()
    assert len(selection.steps[1].rows["code"]) == selection.steps[0].rows_out


@pytest.mark.parametrize("files", [1, 4])
def test_it_reads_pools_in_any_number_of_files(pool, select, files) -> None:
    store = pool(None, None, TABLE, parquet=True, files=files)
    assert select(store, build("filter", {"where": "original_width >= 300"})).rows().tolist() == [1, 5, 6, 9, 11, 14]


@pytest.mark.parametrize(
    "where",
    [
        "original_width > (SELECT 1)",
        "EXISTS (SELECT 1)",
        "original_width IN (SELECT 1)",
        "row_number() OVER () > 1",
        "*",
        "COLUMNS(*) > 1",
        "original_width > ?",
        "1) , (2",
        "1 > 0; DROP TABLE part",
        "original_width >",
        "original_width > 1) FROM read_csv('/etc/passwd') WHERE (true",
        "",
        "original_width > avg(original_width)",
        "count(*) > 1",
        "unnest([1, 2]) > 1",
        "random() < 0.5",
        "text",
        "words(original_width, 3) > 1",
        "no_such_function(text)",
        "read_csv('/etc/passwd')",
        "CAST(text AS INTEGER) > 1",
    ],
)
def test_what_is_no_condition_on_one_row_is_refused(store, select, where) -> None:
    """Also what would give another answer next time."""
    with pytest.raises(UsageError, match="where|condition"):
        select(store, build("filter", {"where": where}))


def test_unknown_columns_are_told_with_the_nearest(store, select) -> None:
    with pytest.raises(UsageError, match="no metadata column 'original_widht'.*Did you mean 'original_width'"):
        select(store, build("filter", {"where": "original_widht > 3"}))


def test_files_are_out_of_reach(store, select, tmp_path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    for where in (f"read_text('{tmp_path}/secret.csv') IS NULL", f"glob('{tmp_path}/*') IS NULL"):
        with pytest.raises(UsageError):
            select(store, build("filter", {"where": where}))


@pytest.mark.parametrize(
    "where",
    [
        "generate_subscripts([1, 2], 1) >= 1",
        "age(TIMESTAMP '2020-01-01') > INTERVAL 1 year",
        "ago(INTERVAL 1 second) > TIMESTAMP '2020-01-01'",
        "now() > TIMESTAMP '2020-01-01'",
        "",
        "original_width > 100) OR (true",
        "original_width > 100 AS wide",
        "original_width > 100 FROM part",
        "original_width > 100 ORDER BY 1",
    ],
)
def test_only_a_row_itself_decides(store, select, where) -> None:
    with pytest.raises(UsageError, match="where|condition"):
        select(store, build("filter", {"where": where}))


def test_columns_that_differ_only_in_case_are_refused(pool, select) -> None:
    store = pool(None, None, {"uid": list("abc"), "Width": [0, 0, 0], "width": [500, 500, 500]}, parquet=True)
    with pytest.raises(UsageError, match="Width, width differ only in case"):
        select(store, build("filter", {"where": '"Width" > 100'}))


@pytest.mark.parametrize(
    "where",
    [
        "nullif(original_width, 0) > 5",
        "if(original_width > 5, true, false)",
        "split_part(text, ' ', 1) <> 'word'",
        "list_sum([original_width, original_height]) > 5",
        "array_to_string([text, 'x'], '-') LIKE '%-x'",
        "age(TIMESTAMP '2021-01-01', TIMESTAMP '2020-01-01') > INTERVAL 1 day OR text IS NULL",
        "CASE WHEN original_width IS NULL THEN false ELSE regexp_matches(lower(text), '[a-z]') END",
        "date_add(DATE '2020-01-01', INTERVAL 1 day) > DATE '2020-01-01' AND fmod(original_width, 2) = 0",
    ],
)
def test_functions_of_one_row_are_allowed(store, select, where) -> None:
    assert 0 < len(select(store, build("filter", {"where": where}))) <= 15
