"""Rows that repeat another pool: exact against plain loops, the same however run, told from the selection alone."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import clustered, write_pool
from tests.report.test_report import ATTACK, picture, read
from thresher import (
    BadRowsError,
    Cache,
    PoolError,
    Processes,
    Selection,
    Serial,
    Threads,
    UsageError,
    build,
    open_store,
    run_steps,
)
from thresher.cli.main import main
from thresher.pruning import reference as module
from thresher.report import write_report

EXAMPLE = Path(__file__).parents[2] / "examples" / "twemoji"


def near(n: int, m: int, seed: int = 0, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A pool of n rows and a reference of m: about half of the pool lies near a row of it, some near each other."""
    rng = np.random.default_rng([n, m, seed])
    reference, rows = rng.normal(size=(m, dim)), rng.normal(size=(n, dim))
    close = rng.random(n) < 0.5
    noise = rng.choice([0.0, 0.02, 0.1, 0.4], (n, 1)) * rng.normal(size=(n, dim))
    rows[close] = (reference[rng.integers(0, m, n)] + noise)[close]
    return rows.astype(np.float32), reference.astype(np.float32)


def loops(rows: np.ndarray, reference: np.ndarray) -> list[list[float]]:
    """All cosines, in Python."""

    def unit(row: np.ndarray) -> list[float]:
        values = [float(x) for x in row]
        length = sum(x * x for x in values) ** 0.5
        return [x / length for x in values]

    others = [unit(row) for row in reference]
    return [[sum(a * b for a, b in zip(unit(row), other, strict=True)) for other in others] for row in rows]


def step(reference: object, **more: Any) -> Any:
    return build("semdedup", {"reference": str(reference), **more})


def same(a: Selection, b: Selection) -> None:
    assert a.dropped_by.tolist() == b.dropped_by.tolist()
    for mine, other in zip(a.steps, b.steps, strict=True):
        for kind in ("rows", "groups", "reference"):
            arrays, others = getattr(mine, kind), getattr(other, kind)
            assert set(arrays) == set(others)
            assert all(np.asarray(arrays[name]).tobytes() == np.asarray(others[name]).tobytes() for name in arrays)


@settings(max_examples=15)
@given(n=st.integers(3, 60), m=st.integers(1, 25), eps=st.sampled_from([0.001, 0.02, 0.2]), seed=st.integers(0, 5))
def test_it_drops_exactly_what_lies_within_eps_of_any_reference_row(tmp_path_factory, n, m, eps, seed) -> None:
    folder = tmp_path_factory.mktemp("pools")
    rows, reference = near(n, m, seed)
    rows[0] = -reference[0]  # one stays, so that there is a selection
    store = write_pool(folder / "pool", rows)
    write_pool(folder / "reference", reference)
    cosines = np.array(loops(rows, reference))
    if (np.abs(cosines - (1 - eps)) < 1e-6).any() or (cosines.max(axis=1)[0]) > 1 - eps:
        return  # within rounding of the threshold
    found = run_steps(
        store, [step(folder / "reference", reference_eps=eps)], engine=Serial(), cache=Cache.at(folder / "cache")
    )
    assert found.mask().tolist() == [max(row) <= 1 - eps for row in cosines]
    evidence = found.steps[0].rows
    for i, row in enumerate(cosines):
        assert evidence["reference_cosine"][i] == pytest.approx(max(row), abs=1e-6)
        at = int(evidence["reference"][i])
        assert at == -1 if max(row) <= 1 - eps else row[at] == pytest.approx(max(row), abs=1e-6)


@pytest.mark.parametrize("against", ["all", "kept"])
@pytest.mark.parametrize("fit", ["given", "pool"])
def test_own_duplicates_are_looked_for_among_the_rows_that_are_left(tmp_path, select, against, fit) -> None:
    """As in two steps, with the same clusters."""
    rows, reference = near(400, 60)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference)
    np.save(tmp_path / "centroids.npy", clustered(5, dim=6))
    how = {"centroids": str(tmp_path / "centroids.npy"), "eps": 0.15, "against": against, "fit": fit}
    one = select(store, step(tmp_path / "other", reference_eps=0.03, **how))
    two = select(store, step(tmp_path / "other", reference_eps=0.03), build("semdedup", how))
    assert one.mask().tolist() == two.mask().tolist()
    first, second = two.steps
    assert 50 < first.rows_out < 350
    assert 20 < second.rows_out < first.rows_out
    left = two.given(1)
    evidence = one.steps[0].rows
    assert evidence["score"][left].tolist() == second.rows["score"].tolist()
    assert evidence["duplicate_of"][left].tolist() == second.rows["duplicate_of"].tolist()
    assert evidence["reference"].tolist() == first.rows["reference"].tolist()
    gone = np.flatnonzero(first.rows["reference"] >= 0)
    assert (evidence["duplicate_of"][gone] == -1).all()
    assert evidence["score"][gone].tolist() == first.rows["score"][gone].tolist()
    assert one.steps[0].groups["size"].sum() == 400
    assert one.steps[0].groups["kept"].sum() == len(one)
    default = select(store, step(tmp_path / "other", **how))
    assert (default.steps[0].rows["reference"] >= 0).sum() > len(gone)  # eps counts for both


def test_a_budget_counts_the_rows_given_and_is_met_from_those_left(tmp_path, select) -> None:
    rows, reference = near(300, 40)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference)
    left = len(select(store, step(tmp_path / "other", reference_eps=0.05)))
    for keep in (1, "25%", left):
        found = select(store, step(tmp_path / "other", reference_eps=0.05, keep=keep, clusters=3))
        assert len(found) == {"25%": 75}.get(keep, keep)
        assert (found.steps[0].rows["reference"][found.mask()] == -1).all()
    with pytest.raises(UsageError, match=rf"only {left} of 300 do not repeat the reference"):
        select(store, step(tmp_path / "other", reference_eps=0.05, keep=left + 1, clusters=3))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than a block of each, cut in different ways."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    reference = clustered(17_000, dim=6, groups=400, spread=0.5, seed=1)
    rows = clustered(17_500, dim=6, groups=300, spread=1.0, seed=2)
    rows[:4_000] = reference[rng.integers(0, 17_000, 4_000)] + 0.01 * rng.normal(size=(4_000, 6)).astype(np.float32)
    rows, reference = rows.astype(np.float16), reference.astype(np.float16)
    tables = [{"uid": [f"{kind}{i:06d}" for i in range(n)]} for kind, n in (("p", 17_500), ("r", 17_000))]
    for name, (files, parquet) in {"one": (1, False), "five": (5, False), "parquet": (2, True)}.items():
        write_pool(folder / f"pool-{name}", rows, table=tables[0], files=files, parquet=parquet)
        write_pool(folder / f"other-{name}", reference, table=tables[1], files=files, parquet=parquet)
    return folder


def cut(large: Path, pool: str, other: str, cache: Path, engine: Any = None, **more: Any) -> Selection:
    return run_steps(
        open_store(str(large / f"pool-{pool}")),
        [step(large / f"other-{other}", **{"reference_eps": 0.002, **more})],
        engine=engine or Serial(),
        cache=Cache(cache, flush_seconds=-1),
    )


@pytest.fixture(scope="module")
def plain(large: Path) -> Selection:
    found = cut(large, "one", "one", large / "cache")
    assert 2_000 < (~found.mask()).sum() < 15_000
    return found


@pytest.mark.parametrize(
    ("pool", "other", "engine"),
    [
        ("five", "one", lambda: Threads(3)),
        ("one", "five", lambda: Processes(2)),
        ("parquet", "parquet", Serial),
        ("one", "parquet", lambda: Threads(1)),
    ],
)
def test_any_engine_and_any_cut_of_the_files_give_the_same(large, plain, tmp_path, pool, other, engine) -> None:
    same(cut(large, pool, other, tmp_path / "cache", engine()), plain)


class Stopping:
    """A serial engine that is interrupted after some calls, and counts them."""

    workers = 1

    def __init__(self, stop_after: int | None) -> None:
        self.calls, self.stop_after = 0, stop_after

    def map(self, fn: Any, tasks: Any) -> Any:
        return Serial().map(partial(self._call, fn), tasks)

    def _call(self, fn: Any, task: Any) -> Any:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        return fn(task)


def test_an_interrupted_comparison_goes_on_where_it_stopped(large, plain, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        cut(large, "one", "one", tmp_path / "cache", Stopping(3))  # of 2 x 2 blocks
    second, third = Stopping(None), Stopping(0)
    same(cut(large, "one", "one", tmp_path / "cache", second), plain)
    assert second.calls == 2
    cut(large, "one", "one", tmp_path / "cache", third, reference_eps=0.001)  # another threshold is only another cut


def test_a_changed_reference_is_noticed(tmp_path, select) -> None:
    rows, reference = near(200, 30)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference)
    how = step(tmp_path / "other", reference_eps=0.05)
    first = select(store, how)
    path = tmp_path / "other" / "image_0.npy"
    stat = path.stat()
    np.save(path, near(200, 30, seed=1)[1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time: the vectors tell
    second = select(store, how)
    assert second.mask().tolist() != first.mask().tolist()
    fresh = select(store, how, cache=Cache.at(tmp_path / "fresh"))
    same(second, fresh)
    assert second.steps[0].notes == fresh.steps[0].notes != first.steps[0].notes


def test_a_changed_row_that_the_fingerprint_does_not_see_is_noticed_by_the_file(tmp_path, select) -> None:
    rows, reference = near(200, 300)
    store = write_pool(tmp_path / "pool", rows)
    other = write_pool(tmp_path / "other", reference, table={"uid": [f"u{i}" for i in range(300)]})
    how = step(tmp_path / "other", reference_eps=0.05)
    first = select(store, how)
    hit = next(
        int(i) for i in first.steps[0].rows["reference"] if i >= 0 and i not in np.linspace(0, 299, 64).astype(int)
    )
    before = other.fingerprint()
    reference[hit] = -reference[hit]
    np.save(tmp_path / "other" / "image_0.npy", reference)
    second = select(store, how)
    assert open_store(str(tmp_path / "other")).fingerprint() == before
    assert hit not in second.steps[0].rows["reference"]
    same(second, select(store, how, cache=Cache.at(tmp_path / "fresh")))


def test_a_reference_that_changes_while_it_is_read_stops_the_run(tmp_path, select) -> None:
    rows, reference = near(50, 20)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference)
    path = tmp_path / "other" / "image_0.npy"

    class Meddling(Stopping):
        def _call(self, fn: Any, task: Any) -> Any:
            os.utime(path, (1, 1))
            return fn(task)

    with pytest.raises(PoolError, match="changed while it was read"):
        select(store, step(tmp_path / "other", reference_eps=0.05), engine=Meddling(None))


def test_the_time_of_a_long_comparison_is_told_before_it_begins(tmp_path, monkeypatch) -> None:
    rows, reference = near(50, 20)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference)
    lines: list[str] = []

    class Told(module.Run.__dataclass_fields__["progress"].default_factory):  # type: ignore[misc, name-defined]
        def say(self, line: str) -> None:
            lines.append(line)

    monkeypatch.setattr(module, "_SLOW", 1)
    for _ in range(2):  # the second time nothing is compared
        run_steps(
            store,
            [step(tmp_path / "other", reference_eps=0.05)],
            engine=Serial(),
            cache=Cache.at(tmp_path / "cache"),
            progress=Told(),
        )
    (line,) = (line for line in lines if "about" in line)
    assert re.fullmatch(rf"comparing 50 rows with 20 of {tmp_path / 'other'}: about \d+\.\d s", line)


def test_what_cannot_be_compared(tmp_path, select) -> None:
    rows, reference = near(50, 20)
    store = write_pool(tmp_path / "pool", rows, rows)
    write_pool(tmp_path / "wide", np.ones((4, 9), np.float32))
    write_pool(tmp_path / "image", reference)
    write_pool(tmp_path / "again", rows, rows, files=3)
    bad = reference.copy()
    bad[7] = np.nan
    write_pool(tmp_path / "bad", bad)
    for name, more, error, text in [
        ("wide", {}, UsageError, "9 dimensions.* of 6"),
        ("image", {"embedding": "text"}, UsageError, "no text embeddings"),
        ("image", {"embedding": "joint"}, UsageError, "no joint embeddings"),
        ("again", {}, UsageError, "the pool itself"),
        ("bad", {}, BadRowsError, "row 7"),
        ("nowhere", {}, PoolError, "nothing is there"),
    ]:
        with pytest.raises(error, match=text):
            select(store, step(tmp_path / name, reference_eps=0.05, **more))
    with pytest.raises(UsageError, match="keeps none"):
        select(store, step(tmp_path / "image", reference_eps=2, eps=0.1))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"reference": "x"}, "reference needs a threshold"),
        ({"reference": "x", "keep": "50%"}, "reference needs a threshold"),
        ({"eps": 0.1, "reference_eps": 0.1}, "reference_eps needs reference"),
        ({"reference": "x", "reference_eps": -0.1}, "reference_eps = -0.1"),
        ({"reference": "x", "reference_eps": 0.1, "clusters": 5}, "clusters: only for duplicates within the pool"),
        ({"reference": "x", "reference_eps": 0.1, "order": "easy", "against": "kept"}, "against, order: only for"),
    ],
)
def test_parameters_that_make_no_sense(given, text) -> None:
    with pytest.raises(UsageError, match=text):
        build("semdedup", given)


def test_bad_rows_of_a_reference_are_left_out_with_skip_bad(tmp_path, select) -> None:
    rows, reference = near(100, 20)
    write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "good", np.delete(reference, 7, axis=0))
    reference[7] = 0
    write_pool(tmp_path / "bad", reference)
    store = open_store(str(tmp_path / "pool"), module.Options(skip_bad=True))
    good, bad = (select(store, step(tmp_path / name, reference_eps=0.05)) for name in ("good", "bad"))
    assert bad.mask().tolist() == good.mask().tolist()
    expected = [i + (i >= 7) for i in good.steps[0].rows["reference"].tolist()]
    assert bad.steps[0].rows["reference"].tolist() == expected  # numbers are those of the files
    write_pool(tmp_path / "nothing", np.zeros((3, 6), np.float32))
    with pytest.raises(PoolError, match="no row of the reference has a usable image"):
        select(store, step(tmp_path / "nothing", reference_eps=0.05))


def test_names_of_the_pool_are_tried_on_the_reference_and_then_the_usual_ones(tmp_path, select) -> None:
    rows, reference = near(60, 20)
    for name, vectors in (("pool", rows), ("alike", reference), ("usual", reference)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / ("image.npy" if name == "usual" else "clip_a.npy"), vectors)
        if name != "usual":
            np.save(tmp_path / name / "clip_b.npy", vectors[::-1].copy())
        pq.write_table(pa.table({"name": [f"{name}{i}" for i in range(len(vectors))]}), tmp_path / name / "m.parquet")
    store = open_store(str(tmp_path / "pool"), module.Options(image="clip_a", key="name"))
    alike, usual = (select(store, step(tmp_path / name, reference_eps=0.05)) for name in ("alike", "usual"))
    assert alike.mask().tolist() == usual.mask().tolist()
    row = int(np.flatnonzero(~alike.mask())[0])
    assert alike.steps[0].repeated(row)["key"] == f"alike{alike.steps[0].rows['reference'][row]}"


def test_the_row_repeated_is_told_from_the_selection_alone(tmp_path, select) -> None:
    rows, reference = near(120, 30)
    keys, captions = [f"k{{{i}}}é" for i in range(30)], ["", None, "long " * 200, *(f"caption {i}" for i in range(27))]
    store = write_pool(tmp_path / "pool", rows)
    pq.write_table(
        pa.table({"uid": keys, "text": captions, "image_embedding": list(reference)}), tmp_path / "{odd} name.parquet"
    )
    made = select(store, step(tmp_path / "{odd} name.parquet", reference_eps=0.05, eps=0.2, clusters=3))
    (tmp_path / "{odd} name.parquet").unlink()
    made.save(tmp_path / "saved")
    loaded = Selection.load(tmp_path / "saved")
    same(loaded, made)
    only = loaded.steps[0]
    gone = np.flatnonzero(only.rows["reference"] >= 0)
    assert 20 < len(gone) < 100
    for i in gone:
        at, cosine = int(only.rows["reference"][i]), float(only.rows["reference_cosine"][i])
        assert only.repeated(i) == {"row": at, "key": keys[at], "caption": (captions[at] or "")[:200]}
        assert only.why(i) == (
            f"repeats row {at} of {tmp_path}/{{odd}} name.parquet (key {keys[at]}): cosine {cosine:.4f} > 0.9500"
        )
    assert only.repeated(int(np.flatnonzero(loaded.mask())[0])) is None
    assert f"{tmp_path}/{{odd}} name.parquet, 30 rows, fingerprint " in only.notes[0]
    assert f"{len(gone)} rows repeat {len(only.reference['row'])} of them" in only.notes[0]


@pytest.mark.parametrize("name", ["row", "key_ends", "key"])
def test_damaged_evidence_on_a_reference_is_refused(tmp_path, select, name) -> None:
    rows, reference = near(60, 20)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", reference, table={"uid": [f"u{i}" for i in range(20)]})
    select(store, step(tmp_path / "other", reference_eps=0.05)).save(tmp_path / "saved")
    path = tmp_path / "saved" / "steps" / "00-semdedup" / f"reference.{name}.npy"
    assert Selection.load(tmp_path / "saved").steps[0].reference["row"].size > 2
    if name == "key":
        path.unlink()
    else:
        np.save(path, np.load(path)[:-1])
    with pytest.raises(PoolError, match="saved"):
        Selection.load(tmp_path / "saved")


# --- the report ----------------------------------------------------------------------------------


def illustrated(path: Path, vectors: np.ndarray, name: str, seed: int) -> None:
    """Write a pool of one parquet file with keys, captions and a picture of its own for every row."""
    rows = range(len(vectors))
    columns = {
        "uid": [f"{name}-{i}" for i in rows],
        "text": [f"{name} caption {i} {ATTACK}" for i in rows],
        "image": [{"bytes": picture(seed + i, side=8), "path": None} for i in rows],
        "image_embedding": list(vectors),
    }
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def drawn(tmp_path, select) -> tuple[Selection, Any, list[list[float]]]:
    """A pool and a reference with pictures; what is left of the pool, its store, and all cosines."""
    rows, reference = near(150, 30)
    illustrated(tmp_path / "pool.parquet", rows, "mine", 0)
    illustrated(tmp_path / "held out.parquet", reference, "theirs", 1_000)
    store = open_store(str(tmp_path / "pool.parquet"))
    made = select(store, step(tmp_path / "held out.parquet", reference_eps=0.05, eps=0.2, clusters=3))
    return made, store, loops(rows, reference)


def galleries(page: str) -> list[tuple[str, float, int, int]]:
    """(the two tiles, cosine, row, row of the reference) of each pair of the section, in the page's order."""
    section = page[page.index("<h3>Duplicates of ") : page.index("<h3>Duplicate pairs")]
    found = []
    for part in section.split('<div class="pair reference">')[1:]:
        cosine = re.search(r"cosine <b>([\d.]+)</b>", part)
        rows = re.findall(r'<span class="key [a-z]+">row (\d+)</span>', part)
        assert cosine is not None
        found.append((part.split("<p>")[0], float(cosine[1]), int(rows[0]), int(rows[1])))
    return found


def test_the_report_shows_what_repeats_the_reference_beside_it(drawn, tmp_path) -> None:
    made, store, cosines = drawn
    page, seen = read(write_report(made, tmp_path / "r.html", store=store, examples=4))
    best = {i: (max(row), row.index(max(row))) for i, row in enumerate(cosines) if max(row) > 0.95}
    pairs = galleries(page)
    assert len(pairs) == 8
    for tiles, cosine, row, other in pairs:
        assert cosine == pytest.approx(best[row][0], abs=1e-4)
        assert other == best[row][1]
        first, second = re.findall(r'title="row (\d+) · ([a-z]+-\d+)"', tiles)
        assert (first, second) == ((str(row), f"mine-{row}"), (str(other), f"theirs-{other}"))
        shown = re.findall(r'src="(data:image/[^"]+)"', tiles)
        assert len(set(shown)) == 2
    assert pairs[0][1] == pytest.approx(max(value for value, _ in best.values()), abs=1e-4)
    assert pairs[4][1] == pytest.approx(min(value for value, _ in best.values()), abs=1e-4)  # nearest to the threshold
    assert [p[1] for p in pairs[:4]] == sorted((p[1] for p in pairs[:4]), reverse=True)
    assert [p[1] for p in pairs[4:]] == sorted(p[1] for p in pairs[4:])
    assert len({p[2] for p in pairs}) == 8
    count, others = len(best), len({other for _, other in best.values()})
    assert f"{count} rows dropped; they repeat {others} rows of the reference" in seen.text
    assert "Duplicates of" in seen.text
    assert "cut 0.95" in seen.text
    assert "cut 0.8" in seen.text
    assert f"Scores of the {150 - count} rows that do not repeat the reference, cut at 0.8000" in seen.text
    assert "{reference" not in page
    assert "repeats row \u2026 of" in seen.text
    assert "theirs caption" in seen.text
    assert "cannot be opened" not in seen.text


@pytest.mark.parametrize(
    "fate", ["gone", "damaged", *(pytest.param(fate, marks=pytest.mark.slow) for fate in ("changed", "elsewhere"))]
)
def test_the_report_needs_the_reference_for_its_pictures_only(drawn, tmp_path, fate, monkeypatch) -> None:
    made, store, _ = drawn
    whole = galleries(write_report(made, tmp_path / "whole.html", store=store).read_text())
    path = tmp_path / "held out.parquet"
    if fate == "gone":
        path.unlink()
    elif fate == "changed":  # other rows would stand beside the captions
        illustrated(path, near(150, 30, seed=7)[1], "others", 5_000)
    elif fate == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        one = made.steps[0]
        parameters = {**one.parameters, "reference": "held out.parquet"}  # given from another folder
        made = dataclasses.replace(made, steps=(dataclasses.replace(one, parameters=parameters),))
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path / "there")
    page, seen = read(write_report(made, tmp_path / "r.html", store=store))
    assert "cannot be opened or has changed" in seen.text
    pairs = galleries(page)
    assert [pair[1:] for pair in pairs] == [pair[1:] for pair in whole]
    for tiles, _, row, other in pairs:
        assert tiles.count("<img") == tiles.count("no image") == 1
        assert f"theirs caption {other} &lt;script" in tiles
        assert f"row {row} · mine-{row}" in tiles
    monkeypatch.chdir(tmp_path)
    if fate == "elsewhere":
        assert "cannot be opened" not in read(write_report(made, tmp_path / "r.html", store=store))[1].text


def test_the_reference_is_not_opened_where_nothing_of_it_is_shown(drawn, tmp_path, monkeypatch) -> None:
    made, store, _ = drawn
    opened: list[Any] = []
    monkeypatch.setattr("thresher.report.examples.open_store", lambda *given: opened.append(given))
    write_report(made, tmp_path / "r.html", store=store, examples=1)
    assert {location for location, _ in opened} == {str(tmp_path / "held out.parquet")}
    opened.clear()
    for more in ({"store": store, "examples": 0}, {}):
        page, seen = read(write_report(made, tmp_path / "r.html", **more))
        assert "rows dropped; they repeat" in seen.text
        assert "cannot be opened" not in seen.text
        assert "cut 0.95" in seen.text
        assert '<div class="pair' not in page
    assert opened == []


def test_the_report_where_nothing_repeats_the_reference(tmp_path, select) -> None:
    rows, _ = near(40, 10)
    store = write_pool(tmp_path / "pool", rows)
    write_pool(tmp_path / "other", np.random.default_rng(5).normal(size=(10, 6)).astype(np.float32))
    made = select(store, step(tmp_path / "other", reference_eps=1e-6))
    assert len(made) == 40
    page, seen = read(write_report(made, tmp_path / "r.html", store=store))
    assert "No row repeats a row of the reference." in seen.text
    assert page.count("<svg") == 3  # the funnel; the cosines, which are the step's scores, once; the map
    assert "cannot be opened" not in seen.text


# --- the command line, on the example pool ----------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """The example pool as it is; 200 of its rows as an evaluation set; which those are, and all unit rows."""
    folder = tmp_path_factory.mktemp("split")
    table = pa.concat_tables([pq.read_table(path) for path in sorted(EXAMPLE.glob("*.parquet"))])
    held = np.sort(np.random.default_rng(0).choice(len(table), 200, replace=False))
    pq.write_table(table.take(held).select(["key", "text", "image_embedding"]), folder / "heldout.parquet")
    vectors = np.stack(table["image_embedding"].to_numpy()).astype(np.float64)
    return folder, held, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], split: Any) -> Any:
    def call(*words: object, cached: bool = True) -> tuple[int, str, str]:
        code = main([*map(str, words), *(["--cache", str(split[0] / "cache")] if cached else [])])
        return code, *capsys.readouterr()

    return call


@pytest.mark.slow  # on few rows: test_it_drops_exactly_what_lies_within_eps_of_any_reference_row and the next
def test_an_evaluation_set_and_its_near_duplicates_go(split, run, tmp_path, monkeypatch) -> None:
    folder, held, units = split
    monkeypatch.chdir(folder)
    out = tmp_path / "clean"
    code, _, err = run(
        "select", "semdedup", EXAMPLE, "-o", out, "--reference", "heldout.parquet", "--reference-eps", 0.1
    )
    assert code == 0
    assert "reference: heldout.parquet, 200 rows, fingerprint" in err
    chosen = Selection.load(out)
    cosines = (units @ units[held].T).max(axis=1)
    assert not chosen.mask()[held].any()
    sure = np.abs(cosines - 0.9) > 1e-5
    assert chosen.mask()[sure].tolist() == (cosines <= 0.9)[sure].tolist()
    others = np.setdiff1d(np.flatnonzero(~chosen.mask()), held)
    assert len(others) > 100  # other skin tones

    monkeypatch.chdir(tmp_path)  # the reference is out of reach now
    code, told, _ = run("explain", "clean", f"row:{others[0]}", cached=False)
    assert code == 0
    row = int(chosen.steps[0].rows["reference"][others[0]])
    assert f"repeats row {row} of heldout.parquet (key " in told
    code, told, _ = run("explain", "clean", f"row:{others[0]}", "--json", cached=False)
    entry = json.loads(told)["steps"][0]["reference"]
    table = pq.read_table(folder / "heldout.parquet")
    cells = [table[name][row].as_py() for name in ("key", "text")]
    assert entry == {"pool": "heldout.parquet", "row": row, "key": cells[0], "caption": cells[1]}
    code, told, _ = run("report", "clean", "-o", "page.html", "--title", "t", cached=False)
    assert code == 0
    assert "reference" in Path("page.html").read_text()
    for kind in ("parquet", "keys"):
        assert run("export", "clean", "--as", kind, "-o", f"all.{kind}", "--no-manifest", cached=False)[0] == 0
    reasons = pq.read_table("all.parquet")["reason"].to_pylist()
    assert reasons[others[0]].startswith(f"repeats row {row} of heldout.parquet (key ")


@pytest.mark.slow
def test_with_its_own_duplicates_in_a_recipe_and_told_by_every_command(split, run, tmp_path, monkeypatch) -> None:
    folder, held, _ = split
    monkeypatch.chdir(folder)
    Path("recipe.toml").write_text(
        '[[step]]\nmethod = "semdedup"\nreference = "heldout.parquet"\nreference_eps = 0.1\neps = 0.15\nclusters = 40\n'
    )
    out = tmp_path / "sel"
    assert run("run", "recipe.toml", EXAMPLE, "-o", out)[0] == 0
    words = ["--reference", "heldout.parquet", "--reference-eps", 0.1, "--eps", 0.15, "--clusters", 40]
    assert run("select", "semdedup", EXAMPLE, "-o", out, *words)[0] == 0  # the same steps: made again
    chosen = Selection.load(out)
    assert not chosen.mask()[held].any()
    codes = chosen.steps[0].rows["code"][~chosen.mask()]
    assert set(codes.tolist()) == {0, 2}
    for row in (int(held[0]), int(np.flatnonzero(chosen.steps[0].rows["duplicate_of"] >= 0)[0])):
        code, told, _ = run("explain", out, f"row:{row}", cached=False)
        assert code == 0
        assert ("     repeats row " in told) == (row == held[0])
        assert ("     duplicates row " in told) == (row != held[0])
        assert "cluster " in told
    assert run("report", out, "-o", tmp_path / "page.html", cached=False)[0] == 0
    assert run("select", "random", EXAMPLE, "-o", tmp_path / "random", "--keep", "50%")[0] == 0
    code, told, _ = run("compare", out, tmp_path / "random", cached=False)
    assert code == 0
    assert "clusters with the largest differences in the share kept" in told


def test_an_older_release_as_reference_leaves_what_is_new(run, tmp_path) -> None:
    out = tmp_path / "new"
    words = ["--reference", EXAMPLE / "twemoji-0.parquet", "--reference-eps", 1e-4]
    assert run("select", "semdedup", EXAMPLE, "-o", out, *words)[0] == 0
    chosen = Selection.load(out)
    assert not chosen.mask()[:988].any()
    assert 2_900 < len(chosen) <= 2_965
    assert chosen.steps[0].rows["reference_cosine"][chosen.mask()].max() <= 1 - 1e-4
