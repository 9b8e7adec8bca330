"""Work done once: files are asked for their size and time once, and DuckDB is opened once."""

from __future__ import annotations

import os
import sys
from collections import Counter

import duckdb
import fsspec
import numpy as np
import pytest

from tests.conftest import write_pool
from thresher import Cache, Keep, PoolError, Selection, Serial, build, open_store, run_steps
from thresher.cli.main import main
from thresher.io.listing import stamp_of
from thresher.pruning import database

FILTER = ["filter", "--where", "width >= 300 AND words(text) > 1"]
TABLE = {
    "uid": [f"{i:04x}" for i in range(90)],
    "text": ["a few words", "one"] * 45,
    "width": list(range(270, 360)),
}


@pytest.fixture
def counts(monkeypatch):
    """Calls of os.stat from thresher by path, and of duckdb.connect.

    Listing a folder tells size and time too and is not counted; nor are checks that a path is a file, which ask in
    the same way but belong to opening it.
    """
    found: Counter[str] = Counter()
    stat, connect = os.stat, duckdb.connect

    def counted(path, *args, **options):
        if sys._getframe(1).f_globals.get("__name__", "").startswith("thresher."):
            found[os.fspath(path)] += 1
        return stat(path, *args, **options)

    def connected(*args, **options):
        found["duckdb"] += 1
        return connect(*args, **options)

    monkeypatch.setattr(os, "stat", counted)
    monkeypatch.setattr(duckdb, "connect", connected)
    database._database.cache_clear()
    return found


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize("method", [FILTER, ["semdedup", "--eps", "0.1"], ["random", "--keep", "50%"]])
def test_one_select_asks_each_file_once_and_opens_one_database(method, parquet, tmp_path, counts) -> None:
    rows = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
    write_pool(tmp_path / "pool", rows, rows, TABLE, files=3, parquet=parquet)
    files = [str(path) for path in (tmp_path / "pool").iterdir()]
    counts.clear()
    assert main(["select", method[0], str(tmp_path / "pool"), "-o", str(tmp_path / "out"), *method[1:]]) == 0
    assert {path: counts[path] for path in files} == dict.fromkeys(files, 1)
    assert counts["duckdb"] == 1  # the keys; a condition is parsed and evaluated in the same one


def test_a_condition_is_parsed_once(monkeypatch, pool, tmp_path) -> None:
    from thresher.pruning.condition import Condition

    parsed = []
    real = Condition.parse
    monkeypatch.setattr(Condition, "parse", lambda where: parsed.append(where) or real(where))
    step = build("filter", {"where": "width > 300"})
    run_steps(pool(None, None, TABLE, parquet=True), [step], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    assert parsed == ["width > 300"]


def test_a_store_elsewhere_is_listed_and_not_asked_file_by_file(tmp_path, monkeypatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    rows = np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32)
    write_pool(tmp_path / "pool", rows, None, None, files=9)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "pool"), "/once", recursive=True)
    asked, listed = [], []
    info, find = MemoryFileSystem.info, MemoryFileSystem.find
    monkeypatch.setattr(
        MemoryFileSystem, "info", lambda self, path, **more: asked.append(path) or info(self, path, **more)
    )
    monkeypatch.setattr(
        MemoryFileSystem, "find", lambda self, path, **more: listed.append(path) or find(self, path, **more)
    )
    store = open_store("memory://once")
    assert (len(listed), len(store.files())) == (1, 9)
    run_steps(store, [build("random", {"keep": "50%"})], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    assert len(listed) == 2  # once more after the step: has a file changed?
    assert not [path for path in asked if path.endswith(".npy")]  # what fsspec asks of the folder is its own affair
    assert not store.changed()
    fs.pipe("/once/image_3.npy", fs.cat("/once/image_3.npy"))
    assert store.changed()


def test_views_and_pickles_know_what_their_store_knows(pool, rows, monkeypatch) -> None:
    import pickle

    from thresher.pool import layout

    store = pool(rows(60))
    names = (store.version(), store.fingerprint())
    monkeypatch.setattr(layout.Layout, "raw_at", None)
    monkeypatch.setattr(layout, "stamp_of", None)
    view = store.where(np.arange(60) % 2 == 0)
    for other in (store, view, pickle.loads(pickle.dumps(view))):
        assert (other.version(), other.fingerprint()) == names


def test_links_are_known_by_what_they_point_to(tmp_path) -> None:
    np.save(tmp_path / "target.npy", np.eye(5, dtype=np.float32))
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "image.npy").symlink_to(tmp_path / "target.npy")
    store = open_store(str(tmp_path / "pool"))
    assert store.layout.stamps == {str(tmp_path / "pool" / "image.npy"): stamp_of("file", str(tmp_path / "target.npy"))}
    assert not store.changed()
    os.utime(tmp_path / "target.npy", (1, 1))
    assert store.changed()
    assert open_store(str(tmp_path / "pool")).version() != store.version()


def test_values_given_as_text_in_python_become_values_once(pool, rows, tmp_path) -> None:
    from thresher.pruning.methods.density import Density

    made = Density(keep="30%", clusters=2)
    assert made.keep == Keep.parse("30%")
    found = run_steps(pool(rows(60)), [made], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    assert len(found) == 18


def test_selections_from_before_packages_were_recorded_are_read(pool, rows, tmp_path) -> None:
    import json

    store = pool(rows(60))
    found = run_steps(store, [build("random", {"keep": "50%"})], engine=Serial(), cache=Cache.at(tmp_path / "cache"))
    path = found.save(tmp_path / "selection") / "selection.json"
    header = json.loads(path.read_text())
    assert header["steps"][0].pop("package") == {"name": "thresher", "version": found.steps[0].version}
    header["steps"][0]["version"] = "0.0.1"
    path.write_text(json.dumps(header))
    assert Selection.load(tmp_path / "selection").steps[0].package == {"name": "thresher", "version": "0.0.1"}
    for wrong in ("thresher", {"name": "thresher"}, {"name": 1, "version": ""}, None):
        header["steps"][0]["package"] = wrong
        path.write_text(json.dumps(header))
        with pytest.raises(PoolError, match="damaged"):
            Selection.load(tmp_path / "selection")
