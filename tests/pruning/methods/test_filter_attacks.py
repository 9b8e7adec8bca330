"""Conditions that try to read, run, wait or grow: each is either evaluated correctly or refused in one line."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from thresher import Cache, PoolError, Selection, Serial, UsageError, build
from thresher.pruning.condition import CHARACTERS, Condition
from thresher.pruning.database import cursor
from thresher.pruning.functions import ALLOWED
from thresher.pruning.run import Run

N = 60
ROWS = {
    "text": [f"caption {i}" for i in range(N)],
    "width": list(range(N)),
    "s": [{"a": i, "b": "x"} for i in range(N)],
    "l": [[1, 2]] * N,
    "class": ["a"] * N,
    "note": ['{"a": 1}'] * N,
}
PART = pa.record_batch(ROWS)
ALL = range(N)

KEPT = {
    "width > 3 -- AND false": range(4, N),
    "text GLOB 'caption 1*'": [1, *range(10, 20)],
    "text GLOB '/etc/*'": [],
    "s.a > 3": range(4, N),
    "s['a'] > 3": range(4, N),
    "l[1] = 1": ALL,
    "l = [1, 2]": ALL,
    "list_sum(l) = 3": ALL,
    "words(text) > 1": ALL,
    "\"class\" = 'a'": ALL,
    "1/0 > 1": ALL,
    "0/0 > 1": [],
    "TRY_CAST(text AS INT) IS NULL": ALL,
    "TRY(text::INT) IS NULL": ALL,
    "text <> '\u202e\ufeff'": ALL,
    " AND ".join(["width >= 0"] * 300): ALL,
    " AND ".join([*["width >= 0"] * 299, "width < 7"]): range(7),
    " OR ".join(f"width = {i}" for i in range(3000)): ALL,
    f"width IN ({', '.join(map(str, range(3, 12_000)))})": range(3, N),
    "+".join(["width"] * 50) + " > 50": range(2, N),
    "length(" + "||".join(["text"] * 50) + ") > 450": range(10, N),
    "width BETWEEN 1 AND 5": range(1, 6),
    "width NOT IN (1, 2)": [0, *range(3, N)],
    "text COLLATE NOCASE = 'CAPTION 1'": [1],
    "strftime(TIMESTAMP '2020-01-01', '%Y') = '2020'": ALL,
    "regexp_matches(text, '(a+)+$')": [],
    "text SIMILAR TO 'caption [0-4]'": range(5),
    "text LIKE '%c%a%p%t%i%o%n%7'": range(7, N, 10),
    "text ILIKE '%CAPTION%7'": range(7, N, 10),
    "text LIKE '%n__'": range(10),
    "factorial(30) > 0": ALL,
    "typeof(width) = 'BIGINT'": ALL,
    "hash(text) <> 0": ALL,
    "levenshtein(text, 'caption 1') = 1": [0, *range(2, 10), *range(10, 20), 21, 31, 41, 51],
    "length(lpad(text, 1000, 'x')) = 1000": ALL,
    "length(repeat(text, 100)) = 900": range(10),
    "format('{:>20}', text) LIKE '          %'": ALL,
    "printf('%05d', width) = '00007'": [7],
    "replace(text, 'caption ', '') = '7'": [7],
    "regexp_replace(text, '[a-z]+ ', '') = '7'": [7],
    "note->>'$.a' = '1'": ALL,
    "json_extract_string(note, 'a') = '1'": ALL,
    "CASE WHEN width > 3 THEN false ELSE true END": range(4),
    "CASE width WHEN 3 THEN true ELSE false END": [3],
    "if(width > 3, text, '') = 'caption 7'": [7],
    "coalesce(nullif(width, 7), 0) = 0": [0, 7],
    "split_part(text, ' ', 2)::INT % 2 = 0": range(0, N, 2),
    "(width, 1) = (7, 1)": [7],
    "struct_pack(a := width).a = 7": [7],
    "map {'a': width}['a'] = 7": [7],
    "age(TIMESTAMP '2021-01-01', TIMESTAMP '2020-01-01') > INTERVAL 1 DAY": ALL,
    "extract(year FROM DATE '2020-01-01' + INTERVAL 1 YEAR) = 2021": ALL,
    "width IS NOT NULL AND width IS DISTINCT FROM 7": [*range(7), *range(8, N)],
    "true": ALL,
}  # fmt: skip

REFUSED = {
    # files, settings, the environment, other queries
    "len((SELECT content FROM read_text('/etc/passwd'))) > 0": "a sub-query is not allowed",
    "read_text('/etc/passwd') IS NOT NULL": "read_text is not allowed",
    "read_blob('/etc/passwd') IS NOT NULL": "read_blob is not allowed",
    "read_csv('/etc/passwd') IS NOT NULL": "read_csv is not allowed",
    "glob('/etc/*') IS NOT NULL": "glob is not allowed",
    "getenv('HOME') = 'x'": "'getenv'",
    "main.getenv('HOME') = 'x'": "'getenv'",
    "current_setting('home_directory') = ''": "current_setting is not allowed",
    "system.main.current_setting('threads') = 1": "current_setting is not allowed",
    "getvariable('x') IS NULL": "getvariable is not allowed",
    "query('SELECT 1')": "query is not allowed",
    "query_table('x')": "query_table is not allowed",
    "json_execute_serialized_sql('{}')": "json_execute_serialized_sql is not allowed",
    "json_deserialize_sql('x') = ''": "json_deserialize_sql is not allowed",
    "sql_auto_complete('x')": "no function 'sql_auto_complete'",
    "from_substrait('x')": "no function 'from_substrait'",
    "write_log('x') IS NULL": "write_log is not allowed",
    "write_blob('w', 'x')": "no function 'write_blob'",
    "file_exists('/etc/passwd')": "no function 'file_exists'",
    "which_secret('s3://x','s3')": "which_secret is not allowed",
    "duckdb_settings() IS NULL": "duckdb_settings is not allowed",
    "pragma_version() = 'x'": "pragma_version is not allowed",
    "current_database() = 'memory'": "current_database is not allowed",
    "current_schema() = 'main'": "current_schema is not allowed",
    "current_catalog() = 'memory'": "current_catalog is not allowed",
    "current_query() = 'main'": "current_query is not allowed",
    "in_search_path('memory', 'main')": "in_search_path is not allowed",
    "has_schema_privilege('main', 'x')": "has_schema_privilege is not allowed",
    "version() = 'x'": "version is not allowed",
    "pg_backend_pid() > 0": "no function 'pg_backend_pid'",
    "txid_current() > 0": "txid_current is not allowed",
    "nextval('x') > 0": "nextval is not allowed",
    "setseed(0.5) IS NULL": "setseed is not allowed",
    "error('boom')": "error is not allowed",
    "TRY(error('x')) IS NULL": "error is not allowed",
    "pg_typeof(width) = 'bigint'": "pg_typeof is not allowed",
    "stats(width) IS NOT NULL": "stats is not allowed",
    "alias(width) = 'width'": "alias is not allowed",
    "create_sort_key(width, 'ASC') IS NOT NULL": "create_sort_key is not allowed",
    "constant_or_null(true, width)": "constant_or_null is not allowed",
    "number_or_null(width) > 3": "number_or_null is not allowed",
    # chance and the clock
    "random() < 0.5": "random is not allowed",
    "uuid() IS NOT NULL": "uuid is not allowed",
    "gen_random_uuid() IS NOT NULL": "gen_random_uuid is not allowed",
    "now() > '2020-01-01'": "now is not allowed",
    "epoch_ms(now()) > 0": "now is not allowed",
    "today() > DATE '2020-01-01'": "today is not allowed",
    "get_current_timestamp() > TIMESTAMP '2020-01-01'": "get_current_timestamp is not allowed",
    "transaction_timestamp() IS NOT NULL": "transaction_timestamp is not allowed",
    "age(TIMESTAMP '2020-01-01') > INTERVAL 1 DAY": "depends on the clock",
    # more than one condition, or more than a condition
    "true; COPY (SELECT 1) TO 'pwn.csv'": "is not an SQL condition",
    "true; ATTACH 'x.db'": "is not an SQL condition",
    "true; PRAGMA database_list": "is not an SQL condition",
    "true; INSTALL httpfs": "is not an SQL condition",
    "true; SELECT true": "give one condition",
    "true FROM read_text('/etc/passwd')": "give one condition",
    "true UNION SELECT true": "give one condition",
    "width > 3 /* AND": "is not an SQL condition",
    "width > 3), (true": "is not an SQL condition",
    "width > 3, true": "give one condition",
    "width > 3 THEN 1 END), (CASE WHEN true": "is not an SQL condition",
    "width > 3 LIMIT 5": "give one condition",
    "width > 3 ORDER BY 1": "give one condition",
    "width > 3 WHERE width > 50": "give one condition",
    "width > 3 GROUP BY width": "give one condition",
    "width > 3 HAVING true": "give one condition",
    "width > 3 QUALIFY true": "give one condition",
    "width > 3 USING SAMPLE 3": "give one condition",
    "DISTINCT width > 3": "give one condition",
    "DISTINCT ON (width) width > 3": "give one condition",
    "width > 3 AS wide": "give one condition",
    "": "give one condition",
    "  \n ": "give one condition",
    "width > 3\0": "NUL",
    "width > 3 AND '\udcff' = text": "is not an SQL condition",
    # more than one row
    "COLUMNS(*) > 3": r"\* or COLUMNS\(\) is not allowed",
    "COLUMNS(c -> c = 'width') > 3": r"\* or COLUMNS\(\) is not allowed",
    "*": r"\* or COLUMNS\(\) is not allowed",
    "#1 > 3": "a column number such as #1 is not allowed",
    "$1 > 3": "a parameter .* is not allowed",
    "? > 3": "a parameter .* is not allowed",
    "EXISTS (SELECT 1)": "a sub-query is not allowed",
    "width IN (SELECT 1)": "a sub-query is not allowed",
    "width = ANY (SELECT 1)": "a sub-query is not allowed",
    "len(ARRAY(SELECT 1)) > 0": "a sub-query is not allowed",
    "sum(width) > 3": "sum is not allowed",
    "count(*) > 3": "not allowed",
    "row_number() OVER () > 3": "a window function is not allowed",
    "lag(width) OVER () > 3": "a window function is not allowed",
    "GROUPING(width) = 0": "grouping function is not allowed",
    "unnest([true, false])": "unnest is not allowed",
    '"unnest"([true, false])': "unnest is not allowed",
    "main.unnest([true, false])": "unnest is not allowed",
    "len([x for x in [1, 2] if x > 1]) = 1": "list_apply is not allowed",
    "len(list_transform([1], x -> x)) = 1": "list_transform is not allowed",
    "len(list_filter([1], lambda x: true)) = 1": "list_filter is not allowed",
    "note -> 'a' IS NULL": "lambda",
    # misspelt, or of the wrong type
    "lenght(text) > 3": "no function 'lenght'.*Did you mean 'length'?",
    "no_such_function(text)": "no function 'no_such_function'",
    "system.main.lower(text) = 'a'": r"call lower as lower\(...\)",
    "text.lower() = 'a'": r"call lower as lower\(...\)",
    "width": "width is BIGINT, not true or false",
    "text": "is VARCHAR, not true or false",
    "1": "1 is INTEGER, not true or false",
    "NULL": "NULL is .*, not true or false",
    "words(width, 3) > 1": "words",
    "text > 3": "Cannot compare",
    "text::INT > 3": "cannot be evaluated: Conversion Error",
    "CAST('now' AS TIMESTAMP) > TIMESTAMP '2020-01-01'": "cannot be evaluated: Conversion Error",
    "DATE 'today' > DATE '2020-01-01'": "cannot be evaluated: Conversion Error",
    "format('{0.__class__}', text) <> ''": "cannot be evaluated|invalid format",
    "regexp_matches(text, '((((((((((a{100}){100}){100}))))))))')": "repetition",
    "(width, 1) > (3, 0)": "compare single values",
    "s > {'a': 1, 'b': 'x'}": "compare single values",
    "[width] < l": "compare single values",
    "[1]::INTEGER[100000] IS NULL": "(?i)a cast to array is not allowed",
    "s::STRUCT(a INT, b TEXT) IS NULL": "(?i)a cast to struct is not allowed",
    "text::ENUM('a') IS NULL": "(?i)a cast to enum is not allowed",
    "text::main.integer = 1": "a cast to .*integer is not allowed",
    # too large
    "width = 1" + " " * CHARACTERS: f"at most {CHARACTERS:,} are allowed",
    " AND ".join(["width >= 0"] * 10_000): f"at most {CHARACTERS:,} are allowed",
    "NOT " * 5000 + "true": "nested too deeply",
    "1" + "+1" * 20_000 + " > 3": "nested too deeply",
    "CASE WHEN " * 800 + "true" + " THEN true END" * 800: "nested too deeply",
    "lower(" * 500 + "text" + ")" * 500 + " = ''": "nested too deeply",
    "least(" * 12 + "width" + ", width)" * 12 + " = 0": "too (deeply|much)",
    "(" * 20 + "width::DOUBLE" + " > 0)::INT::DOUBLE" * 20 + " > 0": "too deeply",
    "format('{:>1000000000}', text) <> ''": "makes values of up to 4,000,",
    "format('{:>{}}', text, 1000000000) <> ''": "needs constant widths",
    "format(text, width) <> ''": "needs a constant as its first argument",
    "printf('%1000000000d', width) <> ''": "makes values of up to 4,000,",
    "printf('%*d', 1000000000, width) <> ''": "needs constant widths",
    "length(lpad(text, 1000000000, 'x')) > 3": "makes values of up to 4,000,",
    "length(rpad(text, width * 100000000, 'x')) > 3": "needs a constant as its second argument",
    "length(lpad(text, 1000 * 1000 * 1000, 'x')) > 3": "needs a constant as its second argument",
    "length(repeat('x', 2000000000)) > 3": "makes values of up to 2,000,",
    "length(repeat(repeat('x', 50000), 50000)) > 3": "makes values of up to 2,500,",
    "length(" + "replace(" * 9 + "text" + ", 'a', 'aaaaaaaaaa')" * 9 + ") > 3": "makes values of up to",
    "replace(text, 'a', text) = ''": "replace needs a constant as its third argument",
    "regexp_replace(text, '', text, 'g') = ''": "regexp_replace needs a constant as its third argument",
    "len(range(3000000000)) > 3": "range is not allowed",
    "list_sum(range(100000000)) > 3": "range is not allowed",
    "len(generate_series(1, 100000000000)) > 3": "generate_series is not allowed",
    "list_aggregate(l, 'sum') > 0": "list_aggregate is not allowed",
    "len(list_resize(l, 1000000000)) > 0": "list_resize is not allowed",
    "levenshtein(repeat('a', 20000), repeat('b', 20000)) > 0": "too much memory or time",
    "jaro_winkler_similarity(repeat('ab', 100000), repeat('ba', 100000)) > 0": "makes values of up to",
    "bit_count(repeat('1', 100000000)::BIT) > 0": "makes values of up to 100,",
    "length(nfc_normalize(repeat('x', 500000000))) > 0": "makes values of up to 500,",
    "text LIKE text": "need a constant pattern",
    "text GLOB '*a*a*a*a*a*a*b'": "has more than 3",
    "text LIKE '%a_%a%a%a%a%a%b'": "has more than 3",
    "json_extract(note, '$..*') IS NULL": "needs a constant path",
}  # fmt: skip

UNKNOWN = [
    "rowid > 3", "part.width > 3", "current_date > DATE '2020-01-01'", "current_timestamp > TIMESTAMP '2020-01-01'",
    "current_user = 'x'", "session_user = 'x'", "user = 'x'", "localtime > TIME '00:00:00'", "widht > 3",
]  # fmt: skip


def evaluate(where: str, part: pa.RecordBatch = PART) -> list[int]:
    with cursor() as db:
        codes, _ = Condition.parse(where).query(db, part.schema).run(db, part)
    return np.flatnonzero(codes == 0).tolist()


@pytest.mark.parametrize("where", KEPT, ids=lambda where: where[:40])
def test_it_is_evaluated(where) -> None:
    assert evaluate(where) == list(KEPT[where])


@pytest.mark.parametrize("where", REFUSED, ids=lambda where: where[:40])
def test_it_is_refused_in_one_short_line(where) -> None:
    with pytest.raises(UsageError, match=REFUSED[where]) as raised:
        evaluate(where)
    assert len(str(raised.value)) < 800
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("where = ")


@pytest.mark.parametrize("where", UNKNOWN)
def test_what_is_no_column_is_refused_before_data_is_read(pool, select, where) -> None:
    store = pool(None, None, {"uid": list("abc"), "width": [1, 2, 3]}, parquet=True)
    with pytest.raises(UsageError, match="no metadata column"):
        select(store, build("filter", {"where": where}))


@pytest.mark.parametrize("where", ["words(width, 3) > 1", "width", "text > 3", "upper(width, 1) = ''"])
def test_types_are_checked_before_data_is_read(pool, tmp_path, where) -> None:
    store = pool(None, None, {"uid": list("abc"), "width": [1, 2, 3], "text": list("abc")}, parquet=True)
    path = next(path for _, path in store.files())
    data = Path(path).read_bytes()
    footer = data[-8 - int.from_bytes(data[-8:-4], "little") :]
    Path(path).write_bytes(data[:4] + b"\xff" * (len(data) - 4 - len(footer)) + footer)  # the types can still be read
    everything = Selection.everything("", store.layout.location, {}, 3)
    run = Run(store, everything, Serial(), Cache.at(tmp_path / "cache"))
    with pytest.raises(UsageError, match="where = "):
        build("filter", {"where": where}).select(run)
    with pytest.raises(PoolError, match="damaged"):
        build("filter", {"where": "width > 1"}).select(run)


def test_every_allowed_function_is_one_of_duckdb_and_not_volatile() -> None:
    with cursor() as db:
        known = db.execute(
            "SELECT lower(function_name), bool_or(function_type IN ('scalar', 'macro')), "
            "bool_or(stability = 'VOLATILE') FROM duckdb_functions() GROUP BY 1"
        ).fetchall()
    scalar = {name for name, one_row, volatile in known if one_row and not volatile}
    assert {name for name in ALLOWED if name.isidentifier()} - scalar <= {"struct_keys", "if", "row"}


def test_memory_follows_the_rows_and_not_the_condition() -> None:
    """65,536 values of 40,000 characters are 2.6 GB together."""
    part = pa.record_batch({"text": pa.array(["a"] * 65_536)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(evaluate("length(repeat(text, 9000)) = 9000", part.slice(0, 4096))) == 4096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_row_that_takes_too_long_is_refused() -> None:
    part = pa.record_batch({"text": pa.array(["a" * 10**6] * 2)})
    with pytest.raises(UsageError, match=r"steps for one row.*left\(text, 1000\)"):
        evaluate("levenshtein(text, reverse(text)) > 3", part)
    assert evaluate("levenshtein(left(text, 1000), left(reverse(text), 1000)) = 0", part) == [0, 1]


@pytest.mark.slow
def test_long_rows_are_evaluated_in_small_slices() -> None:
    texts = ["ab" * i for i in range(60)] * 20
    part = pa.record_batch({"text": pa.array(texts)})
    expected = [i for i, text in enumerate(texts) if len(text) > 100]
    assert evaluate("damerau_levenshtein(text, repeat('x', 5000)) >= 0 AND length(text) > 100", part) == expected


def test_a_slow_condition_ends_at_the_time_limit() -> None:
    part = pa.record_batch({"text": pa.array(["ab" * 500] * 2000)})
    with cursor() as db:
        query = Condition.parse("levenshtein(text, reverse(text)) > 3").query(db, part.schema, seconds=0.02)
        with pytest.raises(UsageError, match=r"takes more than 0.02 s for .* rows"):
            query.run(db, part)
        assert db.execute("SELECT 1").fetchall() == [(1,)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGALRM")
def test_a_signal_in_a_short_query_is_an_interruption() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def ask() -> None:
        with cursor() as db:
            while True:
                db.execute("SELECT sum(range) FROM range(100000)").fetchall()

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_signal_while_a_schema_is_read_is_an_interruption() -> None:
    """DuckDB makes an error of its own of it."""

    class Part:
        def __arrow_c_stream__(self, requested_schema: object = None) -> object:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), cursor() as db:
        db.register("part", Part())
    text = "reading the schema of the object failed: KeyboardInterrupt: no"
    with pytest.raises(duckdb.Error, match="KeyboardInterrupt: no"), cursor() as db:
        db.execute(f"SELECT error('{text}')").fetchall()


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_ends_a_slow_condition(pool, tmp_path, sent) -> None:
    store = pool(None, None, {"uid": list(map(str, range(3000))), "text": ["ab" * 2000] * 3000}, parquet=True)
    command = [sys.executable, "-m", "thresher", "select", "filter", store.layout.location, "-o", tmp_path / "out"]
    command += ["--where", "levenshtein(text, reverse(text)) > 3", "--cache", tmp_path / "cache"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("cache/arrays/*.partial")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted" in err.lower()
    assert not (tmp_path / "out").exists()
