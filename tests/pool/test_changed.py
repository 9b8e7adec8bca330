"""A pool that is replaced while a command reads it: an error, and no file with rows of two versions."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import thresher as th
from tests.pools import make, write_npy
from tests.runs import make_run
from thresher.data.layouts.webdataset import TarPart
from thresher.export.keys import each_key
from thresher.pool.store import EmbeddingStore
from thresher.pruning import score_table
from thresher.pruning.covariance import covariance_errors
from thresher.pruning.run import Run
from thresher.report.explain import explain, history
from thresher.resharding.plan import Source, places_of

POOL = make(40)
CHANGED = "pool: a file of the pool changed while"


@pytest.fixture
def chosen(tmp_path: Path) -> th.Selection:
    """Return a selection without its open pool, as a command loads it."""
    place = write_npy(tmp_path / "pool", POOL)
    th.select(place, th.Random(keep="50%"), cache=tmp_path / "cache", progress=False).save(tmp_path / "sel")
    return th.Selection.load(tmp_path / "sel")


@pytest.fixture
def replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function: from now on, the metadata of the pool is replaced when these methods of a store are called."""

    def at(*names: str) -> None:
        for name in names:
            monkeypatch.setattr(EmbeddingStore, name, _first(getattr(EmbeddingStore, name), tmp_path / "pool"))

    return at


def _first(method: Any, pool: Path) -> Any:
    def called(self: EmbeddingStore, *args: Any, **more: Any) -> Any:
        os.utime(pool / "metadata_0.parquet", ns=(1, 1))
        return method(self, *args, **more)

    return called


@pytest.mark.parametrize("kind", ["keys", "parquet", "csv", "jsonl", "img2dataset"])
def test_an_export_is_not_written(
    tmp_path: Path, chosen: th.Selection, replaced: Callable[..., None], kind: str
) -> None:
    (tmp_path / "out").mkdir()
    replaced("scan", "keys")
    with pytest.raises(th.PoolError, match=f"{CHANGED} it was exported; run again once writing has finished"):
        chosen.export(kind, tmp_path / "out" / "rows.parquet")
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")] == []


def test_keys_for_other_readers_are_refused(chosen: th.Selection, replaced: Callable[..., None]) -> None:
    replaced("scan", "keys")
    with pytest.raises(th.PoolError, match=f"{CHANGED} its keys were read"):
        list(each_key(chosen))


def test_places_for_reshard_are_refused(tmp_path: Path, replaced: Callable[..., None]) -> None:
    place = write_npy(tmp_path / "pool", POOL)
    path = tmp_path / "pool" / "metadata_0.parquet"
    table = pq.read_table(path)
    for name, cells in {"key": table["uid"], "shard": ["a.tar"] * 40, "offset": list(range(40))}.items():
        table = table.append_column(name, pa.array(cells) if isinstance(cells, list) else cells)
    pq.write_table(table, path)
    th.select(place, th.Random(keep="50%"), cache=tmp_path / "cache", progress=False).save(tmp_path / "sel")
    replaced("scan")
    with pytest.raises(th.PoolError, match=f"{CHANGED} the places of its rows were read"):
        places_of(str(tmp_path / "sel"), [Source(str(tmp_path / "a.tar"), "file", 0, TarPart(str(tmp_path / "a.tar")))])


def test_errors_of_the_covariance_are_refused(tmp_path: Path, chosen: th.Selection) -> None:
    run = Run(th.open_store(str(tmp_path / "pool")), chosen, th.Serial(), th.Cache.at(tmp_path / "cache"))
    os.utime(tmp_path / "pool" / "image_0.npy", ns=(1, 1))
    with pytest.raises(th.PoolError, match=f"{CHANGED} its cross-covariance was computed"):
        covariance_errors(run, {"a": chosen}, None)


def test_a_report_is_not_written(tmp_path: Path, chosen: th.Selection, replaced: Callable[..., None]) -> None:
    replaced("scan", "lookup")
    with pytest.raises(th.PoolError, match=f"{CHANGED} the report was made"):
        chosen.report(tmp_path / "page.html", points=0)
    assert not (tmp_path / "page.html").exists()


def test_scores_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_npy(tmp_path / "pool", POOL)
    monkeypatch.setattr(score_table, "_keys", _first(score_table._keys, tmp_path / "pool"))
    with pytest.raises(th.PoolError, match=f"{CHANGED} its keys were read"):
        th.score(place, "clip-score", out=tmp_path / "out.parquet", cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "out.parquet").exists()


def test_clusters_are_not_written(tmp_path: Path, replaced: Callable[..., None]) -> None:
    place = write_npy(tmp_path / "pool", POOL)
    replaced("vectors")
    with pytest.raises(th.PoolError, match=f"{CHANGED} it was clustered"):
        th.cluster(place, 2, out=tmp_path / "out", cache=tmp_path / "cache", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", [False, True])
def test_an_explanation_is_refused(
    tmp_path: Path, chosen: th.Selection, replaced: Callable[..., None], run: bool
) -> None:
    store = th.open_store(str(tmp_path / "pool"))
    training = make_run(tmp_path / "run", store) if run else None
    replaced("lookup")
    with pytest.raises(th.PoolError, match=f"{CHANGED} the row was read"):
        history(training, store, "row:1") if training else explain(chosen, store, "row:1")


@pytest.mark.parametrize("columns", [None, ["row", "key"], ["row", "text"]])
def test_a_table_of_rows_is_refused(
    chosen: th.Selection, replaced: Callable[..., None], columns: list[str] | None
) -> None:
    replaced("scan", "keys")
    with pytest.raises(th.PoolError, match=f"{CHANGED} the table was made"):
        chosen.to_table(columns)
    assert chosen.to_table(["row", "kept"]).num_rows == 40, "it has nothing of the pool"


def test_the_page_in_a_notebook_has_no_rows_of_two_versions(
    chosen: th.Selection, replaced: Callable[..., None]
) -> None:
    assert "No captions" not in chosen._repr_html_()
    replaced("lookup")
    assert f"No captions and images: {chosen.pool}: a file of the pool changed while" in chosen._repr_html_()
