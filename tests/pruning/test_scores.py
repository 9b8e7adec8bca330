"""Scores as files: written by ``thresher score``, read back wherever a column can be named."""

from __future__ import annotations

import ast
import dataclasses
import json
import shlex
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import write_pool
from tests.pools import make, write_npy
from tests.runtime.common import change_of
from thresher import (
    BadRowsError,
    Cache,
    EmbeddingStore,
    Options,
    OutputError,
    Processes,
    Selection,
    Serial,
    UsageError,
    build,
    open_store,
    run_steps,
)
from thresher.cli.main import main
from thresher.pruning.score_table import score, write_scores
from thresher.pruning.scores import scorer, scoring_methods
from thresher.runtime.jobs import ArrayJob

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")
N = 300


@pytest.fixture
def store(pool, rows):
    names = [f"k{i}" for i in np.random.default_rng(3).permutation(N)]
    table = {"uid": names, "width": np.arange(N) % 50, "similarity": np.linspace(0, 1, N)}
    return pool(rows(N, seed=1), rows(N, seed=2), table)


@pytest.fixture
def bare(pool, rows):
    """The same without keys."""
    return pool(rows(N, seed=1), rows(N, seed=2), name="bare")


@pytest.fixture
def place(tmp_path):
    return {"engine": Serial(), "cache": Cache.at(tmp_path / "cache")}


def cosines(rows) -> np.ndarray:
    return np.einsum("ij,ij->i", rows(N, seed=1), rows(N, seed=2))


def keys(store) -> list[str]:
    return [key for _, part in store.keys() for key in part]


# --- writing --------------------------------------------------------------------------------------


def test_a_number_for_every_row_by_key(store, rows, place, tmp_path) -> None:
    target = tmp_path / "clip.parquet"
    found = write_scores(store, scorer("clip-score"), target, **place)
    table = pq.read_table(target)
    assert table.schema.names == ["uid", "clip_score"]
    assert table.schema.field("clip_score").type == pa.float32()
    assert table.column("uid").to_pylist() == keys(store)
    np.testing.assert_allclose(table.column("clip_score").to_numpy(), cosines(rows), atol=1e-6)
    np.testing.assert_array_equal(found.values_n, table.column("clip_score").to_numpy())
    told = json.loads(table.schema.metadata[b"thresher"])
    assert told == found.info
    assert (told["method"], told["parameters"], told["seed"]) == ("clip-score", {"column": "auto"}, 0)
    assert (told["store"], told["rows"], told["of"]) == (store.fingerprint(), N, N)
    joined = duckdb.execute(
        f"SELECT count(*), max(abs(clip_score)) < 2 FROM '{target}' JOIN "
        f"'{store.layout.location}/part_0.parquet' USING (uid)"
    )
    assert joined.fetchone() == (N, True)


def test_the_same_bytes_from_every_engine_and_however_files_are_cut(store, rows, place, tmp_path) -> None:
    table = pq.read_table(Path(store.layout.location) / "part_0.parquet").to_pydict()
    cut = write_pool(tmp_path / "cut", rows(N, seed=1), rows(N, seed=2), table, files=4)
    one = score(store, scorer("clip-score"), **place)
    other = score(cut, scorer("clip-score"), engine=Processes(2), cache=Cache.at(tmp_path / "other"))
    assert one.values_n.tobytes() == other.values_n.tobytes()


def test_without_keys_rows_go_by_number(bare, place, tmp_path) -> None:
    write_scores(bare, scorer("clip-score"), tmp_path / "s.parquet", name="fit", **place)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.names == ["row", "fit"]
    assert table.column("row").to_pylist() == list(range(N))


def test_only_rows_that_were_judged_are_in_it(store, rows, place, tmp_path) -> None:
    some = run_steps(store, [build("random", {"keep": 40})], **place)
    found = write_scores(store, scorer("clip-score"), tmp_path / "s.parquet", within=some, **place)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column("uid").to_pylist() == [keys(store)[i] for i in some.rows()]
    assert found.ids_n.tolist() == some.rows().tolist()
    assert [step["method"] for step in found.info["steps"]] == ["random"]

    image = rows(N, seed=1)
    image[5] = 0
    names = [f"k{i}" for i in range(N - 1)] + ["k3"]
    bad = write_pool(tmp_path / "bad", image, rows(N, seed=2), {"uid": names})
    for key in (None, "row"):
        with pytest.raises(BadRowsError):
            score(open_store(bad.layout.location, Options(key=key)), scorer("clip-score"), **place)
    bad = open_store(bad.layout.location, Options(skip_bad=True))
    found = write_scores(bad, scorer("clip-score"), tmp_path / "good.parquet", **place)
    assert sorted(set(range(N)) - set(found.ids_n)) == [5, N - 1]
    assert pq.read_table(tmp_path / "good.parquet").num_rows == N - 2


def test_a_scorer_made_in_python_cuts_nothing(store, place) -> None:
    cut = score(store, build("clip-score", {"keep": 3, "column": "similarity"}), **place)
    assert len(cut.values_n) == N
    assert cut.values_n.dtype == np.float64
    with pytest.raises(UsageError, match="does not score rows; the scoring methods: .*clip-score"):
        score(store, build("random", {"keep": 3}), **place)
    with pytest.raises(UsageError, match="'clip-scor' is not a scoring method.*Did you mean"):
        scorer("clip-scor")


def test_where_scores_are_not_written(store, place, tmp_path) -> None:
    method = scorer("clip-score")
    inside = Path(store.layout.location)
    for target, name, error, message in (
        (inside / "scores.parquet", None, OutputError, "read as part of the pool"),
        (inside / "part_0.parquet", None, OutputError, "is a file of the pool"),
        (tmp_path / "scores.csv", None, UsageError, r"ends in .parquet"),
        (tmp_path / "scores.parquet", "uid", UsageError, "key column"),
    ):
        with pytest.raises(error, match=message):
            write_scores(store, method, target, name=name, **place)
        assert not (tmp_path / "cache").exists(), "worked before it looked"
    write_scores(store, method, tmp_path / "scores.parquet", **place)
    before = (tmp_path / "scores.parquet").read_bytes()
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        write_scores(store, scorer("clip-score", {"column": "width"}), tmp_path / "scores.parquet", **place)
    assert (tmp_path / "scores.parquet").read_bytes() == before
    write_scores(store, scorer("clip-score", {"column": "width"}), tmp_path / "scores.parquet", overwrite=True, **place)
    assert (tmp_path / "scores.parquet").read_bytes() != before


# --- reading --------------------------------------------------------------------------------------


def judged(store, source, place, **how) -> np.ndarray:
    """What a method that takes any column finds there."""
    method = build("clip-score", {"column": str(source), "keep": "100%"})
    return run_steps(store, [method], **place, **how).steps[-1].rows["score"]


@pytest.mark.parametrize(
    "kind", ["as written", "shuffled", "more rows", "small row groups", "large text", "categories"]
)
def test_a_file_is_joined_by_key(kind, store, rows, place, tmp_path) -> None:
    path = tmp_path / "s.parquet"
    write_scores(store, scorer("clip-score"), path, **place)
    table, groups = pq.read_table(path), None
    if kind in ("shuffled", "large text", "categories"):
        table = table.take(np.random.default_rng(0).permutation(N))
    if kind == "more rows":
        more = pa.table({"uid": ["x", "y"], "clip_score": pa.array([1.0, None], pa.float32())})
        table = pa.concat_tables([more.cast(table.schema), table])
    elif kind == "small row groups":
        groups = 7
    elif kind == "large text":
        table = table.set_column(0, "uid", table.column("uid").cast(pa.large_string()))
    elif kind == "categories":
        table = table.set_column(0, "uid", table.column("uid").dictionary_encode())
    pq.write_table(table, path, row_group_size=groups)
    for source in (path, f"{path}:clip_score"):
        np.testing.assert_allclose(judged(store, source, place), cosines(rows), atol=1e-6)
    some = run_steps(store, [build("random", {"keep": 37})], **place)
    found = judged(store, path, place, within=some)
    np.testing.assert_allclose(found, cosines(rows)[some.rows()], atol=1e-6)


@given(st.permutations(range(12)), st.sets(st.integers(0, 11), min_size=1), st.booleans())
def test_any_order_and_any_part(tmp_path_factory, order, part, keyed) -> None:
    folder = tmp_path_factory.mktemp("any")
    table = {"uid": [f"{i}" for i in range(12)], "n": np.arange(12)} if keyed else None
    store = write_pool(folder / "pool", np.eye(12, 3, dtype=np.float32) + 1, None, table, files=3)
    place = {"engine": Serial(), "cache": Cache.at(folder / "cache")}
    order = [i for i in order if i in part]
    name, values = ("uid", [str(i) for i in order]) if keyed else ("row", order)
    pq.write_table(pa.table({name: values, "v": np.array(order) * 0.5}), folder / "s.parquet")
    start = Selection.everything(store.fingerprint(), store.layout.location, {}, 12)
    mask = np.isin(np.arange(12), list(part))
    within = start.then(run_steps(store, [build("random", {"keep": 1})], **place).steps[0], mask)
    assert judged(store, folder / "s.parquet", place, within=within).tolist() == [i * 0.5 for i in sorted(part)]
    if len(part) < 12:
        first = min(set(range(12)) - part)
        with pytest.raises(BadRowsError, match=rf"for the {name} {first} \({12 - len(part)} of 12 rows are missing"):
            judged(store, folder / "s.parquet", place)


def test_the_pools_key_comes_first_then_one_called_key(store, place, tmp_path) -> None:
    names, wrong = keys(store), [f"k{i}" for i in range(N)]
    pq.write_table(pa.table({"key": wrong, "uid": names, "v": np.arange(N)}), tmp_path / "both.parquet")
    assert judged(store, tmp_path / "both.parquet", place).tolist() == list(range(N))
    pq.write_table(pa.table({"key": names, "v": np.arange(N)}), tmp_path / "key.parquet")
    assert judged(store, tmp_path / "key.parquet", place).tolist() == list(range(N))


def test_whole_numbers_as_keys(pool, rows, place, tmp_path) -> None:
    store = pool(rows(20), None, {"id": np.arange(100, 120)})
    pq.write_table(
        pa.table({"id": pa.array(range(119, 99, -1), pa.int32()), "v": np.arange(20)}), tmp_path / "s.parquet"
    )
    assert judged(store, tmp_path / "s.parquet", place).tolist() == list(range(19, -1, -1))


def test_an_export_is_a_table_of_scores_too(store, rows, place, tmp_path) -> None:
    from thresher.export.write import export

    selection = run_steps(store, [build("clip-score", {"keep": "10%"})], **place)
    export(selection, "parquet", tmp_path / "rows.parquet", store=store)
    np.testing.assert_allclose(judged(store, f"{tmp_path / 'rows.parquet'}:score", place), cosines(rows), atol=1e-6)


def test_a_metadata_column_or_method_of_the_name_is_meant_first(store, place, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = pq.read_table(Path(store.layout.location) / "part_0.parquet")
    odd = table.append_column("s.parquet", table.column("width")).append_column("clip-score", table.column("width"))
    pq.write_table(odd, Path(store.layout.location) / "part_0.parquet")
    store = open_store(store.layout.location)
    for source in ("s.parquet", "clip-score"):
        assert judged(store, source, place).tolist() == (np.arange(N) % 50).tolist()


def test_files_that_do_not_fit_are_told(store, bare, place, tmp_path) -> None:
    names = keys(store)

    def refused(error, message, columns, on=store, column="", name="s.parquet") -> None:
        pq.write_table(pa.table(columns), tmp_path / name)
        with pytest.raises(error, match=message):
            judged(on, f"{tmp_path / name}{column}", place)

    v = np.arange(N, dtype=float)
    nothing = np.where(v == 4, np.nan, v)
    refused(UsageError, "no column 'uid' or 'key' to join by; it has row, v", {"row": np.arange(N), "v": v})
    refused(UsageError, "s.parquet has a, b; choose one, as in .*s.parquet:a", {"uid": names, "a": v, "b": v})
    refused(UsageError, "has no column of numbers", {"uid": names, "v": names})
    refused(UsageError, "no column 'b'; it has uid, bb.*Did you mean 'bb'", {"uid": names, "bb": v}, column=":b")
    refused(UsageError, "'t' is not numeric", {"uid": names, "t": names}, column=":t")
    refused(BadRowsError, "the uid 'k1' occurs more than once", {"uid": ["k1", *names], "v": [0, *v]})
    refused(BadRowsError, r"row 4: 'v' is empty or NaN \(1 such row\)", {"uid": names, "v": nothing})
    refused(BadRowsError, rf"for the uid {names[0]} \(2 of {N} rows", {"uid": names[2:], "v": v[2:]})
    refused(UsageError, "no column 'row' to join by", {"uid": names, "v": v}, bare)
    refused(BadRowsError, "must hold row numbers from 0 to 299", {"row": np.arange(N) + 1, "v": v}, bare)
    refused(BadRowsError, "must hold row numbers from 0", {"row": v + 0.5, "v": v}, bare)
    refused(BadRowsError, "the row 3 appears more than once", {"row": [3, *range(N)], "v": [0, *v]}, bare)
    refused(BadRowsError, r"for the row 0 \(1 of 300 rows", {"row": np.arange(1, N), "v": v[1:]}, bare)
    with pytest.raises(UsageError, match="combine needs columns"):
        judged(store, "combine", place)


@pytest.mark.parametrize("name", ["group", 'it\'s "quoted" (v2)'])
def test_the_advice_on_rows_without_a_score_can_be_followed(name: str, tmp_path, capsys, monkeypatch) -> None:
    """A name that SQL reads as a word of its own, or that needs quotes."""
    monkeypatch.chdir(tmp_path)
    values = np.where(np.arange(40) % 4 == 0, np.nan, np.arange(40.0))
    rows = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    pq.write_table(
        pa.table({"uid": [f"k{i}" for i in range(40)], "embedding": list(rows), name: values}), "pool.parquet"
    )
    pq.write_table(pa.table({"uid": [f"k{i}" for i in range(40)], name: values}), "scores.parquet")
    cut = ["select", "clip-score", "pool.parquet", "--keep", "50%"]
    assert main([*cut, "-o", "cut", "--column", name]) == 2
    where = ast.literal_eval(capsys.readouterr().err.rpartition("where = ")[2].strip())
    assert main(["select", "filter", "pool.parquet", "-o", "known", "--where", where]) == 0
    assert main([*cut, "-o", "cut", "--column", name, "--within", "known"]) == 0
    assert Selection.load("cut").steps[0].rows_out == 30
    capsys.readouterr()
    assert main([*cut, "-o", "again", "--column", f"scores.parquet:{name}"]) == 2
    words = shlex.split(capsys.readouterr().err.rpartition("--metadata ")[2])
    assert words == ["scores.parquet", "--where", where]


def test_row_numbers_of_another_pool_are_refused(bare, pool, rows, place, tmp_path) -> None:
    write_scores(bare, scorer("clip-score"), tmp_path / "s.parquet", **place)
    other = pool(rows(N, seed=7), rows(N, seed=8), name="other")
    with pytest.raises(UsageError, match="uses row numbers of another pool .*bare.*compute the scores again"):
        judged(other, tmp_path / "s.parquet", place)


def test_a_damaged_file_is_told(store, place, tmp_path) -> None:
    write_scores(store, scorer("clip-score"), tmp_path / "s.parquet", **place)
    whole = (tmp_path / "s.parquet").read_bytes()
    (tmp_path / "s.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"s.parquet: .*truncated or damaged"):
        judged(store, tmp_path / "s.parquet", place)


def test_scores_join_as_metadata_and_filter_the_pool(store, rows, place, tmp_path) -> None:
    path = tmp_path / "s.parquet"
    write_scores(store, scorer("clip-score"), path, **place)
    pq.write_table(pq.read_table(path).slice(10), path)  # rows without a score get none, and do not pass
    joined = open_store(store.layout.location, Options(metadata=str(path)), scratch=str(tmp_path / "cache"))
    assert set(joined.columns) == {"uid", "width", "similarity", "clip_score", "joined"}
    found = run_steps(joined, [build("filter", {"where": "clip_score > 0.2"})], **place)
    expected = (cosines(rows) > 0.2) & (np.arange(N) >= 10)
    assert found.rows().tolist() == np.flatnonzero(expected).tolist()
    assert found.steps[0].notes == (f"10 rows have no match in {path}: its columns are empty there",)


# --- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys) -> None:
    out = str(tmp_path / "clip.parquet")
    assert main(["score", "clip-score", POOL, "-o", out]) == 0
    told = capsys.readouterr().out
    assert "3,953 of 3,953 rows scored" in told
    assert f"written to {out}" in told
    assert pq.read_schema(out).names == ["key", "clip_score"]
    before = change_of(Path(out))
    assert main(["score", "clip-score", POOL, "-o", out]) == 0
    assert capsys.readouterr().err == f"{out}: already done; nothing was changed\n"
    assert change_of(Path(out)) == before
    for other in (["score", "clip-score", POOL, "--name", "fit"], ["score", "negclip", POOL]):
        assert main([*other, "-o", out]) == 2
        assert "exists already; choose another name or pass --overwrite" in capsys.readouterr().err
    assert main(["score", "clip-score", POOL, "-o", out, "--overwrite", "--name", "fit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 3953
    assert found["least"] <= found["mean"] <= found["most"]
    assert pq.read_schema(out).names == ["key", "fit"]
    assert main(["select", "clip-score", POOL, "-o", str(tmp_path / "a"), "--keep", "10%"]) == 0
    assert main(["select", "clip-score", POOL, "-o", str(tmp_path / "b"), "--keep", "10%", "--column", out]) == 0
    one, other = Selection.load(tmp_path / "a"), Selection.load(tmp_path / "b")
    np.testing.assert_array_equal(one.mask(), other.mask())
    part = str(tmp_path / "part.parquet")
    assert (
        main(["score", "combine", POOL, "-o", part, "--columns", f"{out}, width=-1", "--within", str(tmp_path / "a")])
        == 0
    )
    assert pq.read_metadata(part).num_rows == 395


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "semdedup", POOL, "-o", "x.parquet"], "no scoring method 'semdedup'"),
        (["score", "clip-scor", POOL, "-o", "x.parquet"], "Did you mean 'clip-score'"),
        (["score", "clip-score", POOL, "-o", "x.parquet", "--keep", "10%"], "--keep"),
        (["score", "clip-score", POOL, "-o", "x.npy"], "ends in .parquet"),
        (["score", "combine", POOL, "-o", "x.parquet"], "combine needs columns"),
        (["score", "clip-score", POOL, "-o", "x.parquet", "--column", "nothing"], "column = 'nothing'"),
        (["score", "clip-score", POOL, "-o", "x.parquet", "--name", "key"], "key column"),
    ],
)
def test_mistakes_leave_nothing_behind(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("Error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_scoring_method_has_its_command(capsys) -> None:
    for name in scoring_methods():
        assert main(["score", name, "--help"]) == 0
        told = capsys.readouterr().out
        assert "--keep" not in told
        assert "--threshold" not in told


NAMES = [f"{i:09d}" for i in range(N)]


@pytest.fixture
def numbered(pool, rows):
    """A pool whose keys are digits with leading zeros."""
    return pool(rows(N, seed=1), rows(N, seed=2), {"key": NAMES}, name="numbered")


def as_text(path: Path, keys: list[str], values: list[str], more: str = "") -> str:
    """A table of keys and scores in the format of the ending; values are words of JSON or of a CSV file."""
    if path.suffix in (".csv", ".tsv"):
        comma = "," if path.suffix == ".csv" else "\t"
        lines = [comma.join(pair) for pair in zip(["key", *keys], ["aes", *values], strict=True)]
        path.write_text("\n".join(lines) + "\n")
    else:
        objects = [f'{{"key": "{key}", "aes": {value or "null"}}}' for key, value in zip(keys, values, strict=True)]
        path.write_text(f"[{', '.join(objects)}]" if path.suffix == ".json" else "\n".join(objects) + "\n")
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "json", "arrow", "feather"])
@pytest.mark.parametrize("named", ["", ":aes"])
def test_scores_in_other_formats(ending, named, numbered, place, tmp_path) -> None:
    """Recap-DataComp-1B#11 joins by key; keys of digits keep their zeros."""
    order = np.random.default_rng(5).permutation(N)
    values = np.random.default_rng(6).standard_normal(N)
    keys = [NAMES[i] for i in order]
    path = tmp_path / f"scores.{ending}"
    if ending in ("arrow", "feather"):
        found = pa.table({"key": keys, "aes": values[order]})
        with pa.ipc.new_file(str(path), found.schema) as file:
            file.write_table(found, max_chunksize=70)
    else:
        as_text(path, keys, [repr(float(value)) for value in values[order]])
    sel = run_steps(numbered, [build("clip-score", {"keep": "30%", "column": f"{path}{named}"})], **place)
    assert sel.mask().tolist() == (values >= np.sort(values)[N - 90]).tolist()
    joined = open_store(numbered.layout.location, Options(metadata=str(path)), scratch=str(tmp_path / "scratch"))
    np.testing.assert_array_equal(joined.column("aes"), values)
    assert joined.column("joined").all()


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        (["NaN", *["0.5"] * 299], BadRowsError, r"row 0: 'aes' is empty or NaN \(1 such row\)"),
        (["", *["0.5"] * 299], BadRowsError, r"row 0: 'aes' is empty or NaN"),
        (
            ['"high"', *["0.5"] * 299],
            UsageError,
            r"has no column of numbers except keys; it has key \(string\), aes \(string\)",
        ),
    ],
)
def test_scores_that_are_no_numbers(ending, values, error, says, numbered, place, tmp_path) -> None:
    path = as_text(tmp_path / f"scores.{ending}", NAMES, values)
    with pytest.raises(error, match=says):
        run_steps(numbered, [build("clip-score", {"keep": "30%", "column": path})], **place)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_keys_of_scores_that_do_not_fit(ending, numbered, place, tmp_path) -> None:
    path = as_text(tmp_path / f"scores.{ending}", [*NAMES, NAMES[7]], ["0.5"] * (N + 1))
    with pytest.raises(BadRowsError, match="the key '000000007' occurs more than once"):
        run_steps(numbered, [build("clip-score", {"keep": "30%", "column": path})], **place)
    with pytest.raises(BadRowsError, match="the key '000000007' occurs more than once"):
        open_store(numbered.layout.location, Options(metadata=path))
    path = as_text(tmp_path / f"some.{ending}", NAMES[:-2], ["0.5"] * (N - 2))
    with pytest.raises(BadRowsError, match=r"no row for the key 000000298 \(2 of 300 rows are missing\)"):
        run_steps(numbered, [build("clip-score", {"keep": "30%", "column": path})], **place)


def test_infinite_scores_in_text(numbered, place, tmp_path) -> None:
    path = as_text(tmp_path / "scores.csv", NAMES, ["inf", "-Infinity", *["1e-3"] * 298])
    mask = run_steps(numbered, [build("clip-score", {"threshold": 0.0, "column": path})], **place).mask()
    assert np.flatnonzero(~mask).tolist() == [1]


# --- jobs -----------------------------------------------------------------------------------------


def small_blocks(store: EmbeddingStore) -> EmbeddingStore:
    return dataclasses.replace(store, block=64)


@pytest.mark.parametrize("of", [1, 3, 40])
def test_jobs_give_the_bytes_of_one_call(store, place, tmp_path, of) -> None:
    store = small_blocks(store)
    whole = write_scores(store, scorer("clip-score"), tmp_path / "whole.parquet", **place)
    target, rows = tmp_path / "s.parquet", 0
    for number in range(of, 0, -1):
        done = write_scores(store, scorer("clip-score"), target, shard=ArrayJob(number, of), **place)
        rows += len(done.values_n)
        assert not target.exists()
        if number > 1:
            with pytest.raises(OutputError, match=rf"have not finished: run the command with --shard 1/{of}"):
                write_scores(store, scorer("clip-score"), target, **place)
    assert rows == N
    assert done.info["notes"][-1].endswith("and so have all others: run the same command without --shard")
    merged = write_scores(store, scorer("clip-score"), target, **place)
    assert merged.info == whole.info
    assert target.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".s")] == []
    again = write_scores(store, scorer("clip-score"), target, shard=ArrayJob(1, of), **place)
    assert (len(again.values_n), again.info["notes"]) == (0, ["the scores are finished already"])
    some = Selection.everything(store.fingerprint(), store.layout.location, {}, N)
    some = dataclasses.replace(some, dropped_by=np.where(np.arange(N) < 5, 0, -1).astype(np.int16))
    with pytest.raises(OutputError, match="exists already"):
        write_scores(store, scorer("clip-score"), target, shard=ArrayJob(1, of), within=some, **place)


def test_a_job_does_not_claim_to_have_written_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["score", "clip-score", write_npy(tmp_path / "pool", make(40)), "-o", str(tmp_path / "s.parquet")]
    words += ["--cache", str(tmp_path / "cache"), "--quiet"]
    assert main([*words, "--shard", "1/2"]) == 0
    assert "written" not in capsys.readouterr().out
    assert main([*words, "--shard", "2/2"]) == 0
    assert main(words) == 0
    assert "written to" in capsys.readouterr().out


def test_jobs_score_the_rows_of_a_selection(store, place, tmp_path) -> None:
    store = small_blocks(store)
    kept = run_steps(store, [build("random", {"keep": "60%"})], **place)
    whole = write_scores(store, scorer("clip-score"), tmp_path / "whole.parquet", within=kept, **place)
    for number in (1, 2):
        shard = ArrayJob(number, 2)
        write_scores(store, scorer("clip-score"), tmp_path / "s.parquet", within=kept, shard=shard, **place)
    with pytest.raises(UsageError, match=r"were started with other options \(within is"):
        write_scores(store, scorer("clip-score"), tmp_path / "s.parquet", **place)
    merged = write_scores(store, scorer("clip-score"), tmp_path / "s.parquet", within=kept, **place)
    assert merged.info == whole.info
    assert (tmp_path / "s.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_methods_that_compare_rows_and_lost_scores_are_refused(store, place, tmp_path) -> None:
    store, target = small_blocks(store), tmp_path / "s.parquet"
    for name, parameters in (("negclip", {}), ("clip-score", {"column": "negclip"}), ("normsim", {})):
        with pytest.raises(UsageError, match=r"compares rows with each other, so jobs cannot share them"):
            write_scores(store, scorer(name, parameters), target, shard=ArrayJob(1, 2), **place)
    assert not list(tmp_path.glob(".s*"))
    for number in (1, 2):
        write_scores(store, scorer("clip-score"), target, shard=ArrayJob(number, 2), **place)
    with pytest.raises(UsageError, match=r"started as one of 2"):
        write_scores(store, scorer("clip-score"), target, shard=ArrayJob(3, 3), **place)
    (tmp_path / ".s.parquet.jobs" / "00002.npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(OutputError, match=r"00002.npy is missing or damaged: run the command with --shard 2/2, then"):
        write_scores(store, scorer("clip-score"), target, **place)
    write_scores(store, scorer("clip-score"), target, shard=ArrayJob(2, 2), **place)
    assert len(write_scores(store, scorer("clip-score"), target, **place).values_n) == N
