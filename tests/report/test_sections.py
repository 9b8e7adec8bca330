"""Sections of the report: the map, what was lost, names of clusters, and cuts that can be moved."""

from __future__ import annotations

import json
import os
import re
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.test_report import ATTACK, ROWS, SCRIPT, picture, read, write_pool
from thresher import Cache, EmbeddingStore, PoolError, Selection, build, open_store, run_steps
from thresher.report import write_report
from thresher.report.compared import write_comparison
from thresher.report.examples import with_vectors
from thresher.report.facts import judged
from thresher.report.sample_map import SIDE, sample_map
from thresher.report.slider import slider


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache.at(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    images = [{"bytes": picture(i), "path": None} for i in range(ROWS)]
    captions = [f"{ATTACK} animal{i % 10}" for i in range(ROWS)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return open_store(str(write_pool(tmp_path_factory.mktemp("pools") / "pool", pa.array(images, struct), captions)))


@pytest.fixture(scope="module")
def chain(store: EmbeddingStore, cache: Cache) -> Selection:
    steps = [
        build("semdedup", {"eps": 0.05, "clusters": 10}),
        build("clip-score", {"keep": "80%"}),
        build("density", {"keep": "50%", "clusters": 8}),
    ]
    return run_steps(store, steps, cache=cache)


@pytest.fixture(scope="module")
def page(chain: Selection, store: EmbeddingStore, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> str:
    return read(write_report(chain, tmp_path_factory.mktemp("r") / "r.html", store=store, cache=cache))[0]


def test_the_contents_link_to_every_section(page: str) -> None:
    sections = re.findall(r'<section class="card" id="([^"]+)"', page)
    linked = re.findall(r'<li><a href="#([^"]+)">', page[: page.index("<main>")])
    assert linked == ["top", *sections]
    assert {"map", "lost", "step-1", "step-3"} <= set(sections)


def test_clusters_are_named_and_pictures_have_their_caption(page: str) -> None:
    table = page[page.index('<table class="clusters">') :]
    assert re.search(r"<bdi>[^<]*animal\d[^<]*</bdi>", table)
    texts = [unescape(text) for text in re.findall(r'<img [^>]*alt="([^"]*)"', page)]
    assert texts
    assert all(re.fullmatch(re.escape(ATTACK) + r" animal\d", text) for text in texts)


def test_wide_tables_can_be_scrolled_with_the_keyboard(page: str) -> None:
    for tag in re.findall(r'<div class="scroll[^>]*>', page):
        assert re.search(r'tabindex="0" role="group" aria-label="[^"]+"', tag)


def test_tiles_say_what_their_numbers_are(page: str) -> None:
    small = re.findall(r"<small>([^<]+)</small>", page)
    assert small
    assert [text for text in small if not re.fullmatch(r"(cosine|score|distance) -?[\d.e-]+", text)] == []


def test_shares_kept_are_those_of_the_mask(page: str, chain: Selection) -> None:
    lost = page[page.index('id="lost"') : page.index('id="step-1"')]
    kept = chain.mask()
    for i in range(10):
        rows = np.arange(ROWS) % 10 == i
        assert re.search(rf"animal{i}</bdi></t[hd]><td>30</td><td>{int(kept[rows].sum())}</td>", lost)
    assert "image_embedding</bdi> (contains images, vectors, lists or structs)" in lost
    assert "surely differs by" in lost


def test_a_slider_counts_the_rows_of_every_cut(chain: Selection) -> None:
    found = [slider(step) for step in judged(chain)]
    assert found[2] is None  # density has no single cut
    for step, made in zip(judged(chain), found[:2], strict=False):
        assert made is not None
        data = json.loads(made.data)
        scores = np.asarray(step.step.rows["score"], np.float64)
        usable = scores > -1 if "duplicate_of" in step.step.rows else np.isfinite(scores)
        edges = np.array(data["edges"])
        assert data["kept"] == step.step.rows_out
        assert edges[data["now"]] == pytest.approx(step.step.cut, abs=1e-5)
        for at in (0, data["now"] // 2, data["now"], (data["now"] + data["edges"].__len__()) // 2, len(edges) - 1):
            side = data["rows"][at:] if data["above"] else data["rows"][:at]
            passes = scores >= edges[at] if data["above"] else scores < edges[at]
            expected = int((usable & passes).sum() + (~usable).sum())
            assert sum(side) + data["outside"] == pytest.approx(expected, abs=2)  # edges are rounded in the page
    assert json.loads(found[0].data)["parameter"] == "eps" if found[0] else False
    assert json.loads(found[1].data)["parameter"] == "keep" if found[1] else False


def test_steps_that_mix_kept_and_dropped_rows_have_no_slider(store: EmbeddingStore, cache: Cache) -> None:
    for name, options in (("random", {"keep": "50%"}), ("density", {"keep": "50%", "clusters": 5})):
        selection = run_steps(store, [build(name, options)], cache=cache)
        assert [slider(step) for step in judged(selection)] == [None]


def test_the_map_shows_every_fate_and_stays_inside(
    chain: Selection, store: EmbeddingStore, cache: Cache, page: str
) -> None:
    made = sample_map(chain, store, cache)
    assert made is not None
    assert sum(dots.count for dots in made.dots) == ROWS
    assert [dots.count for dots in made.dots] == [dots.rows for dots in made.dots]
    by = np.asarray(chain.dropped_by)
    assert [dots.rows for dots in made.dots] == [int((by == i).sum()) for i in (-1, 0, 1, 2) if (by == i).any()]
    numbers = [int(n) for dots in made.dots for n in re.findall(r"\d+", dots.path.replace("h0", ""))]
    assert 0 <= min(numbers) <= max(numbers) <= SIDE
    few = sample_map(chain, store, cache, points=50)
    assert few is not None
    assert few.shown == 50
    assert sample_map(chain, store, cache, points=0) is None
    assert 'id="map"' in page


def test_a_page_without_pool_has_no_map_and_no_shares(chain: Selection, tmp_path: Path) -> None:
    page, _ = read(write_report(chain, tmp_path / "r.html"))
    assert 'id="map"' not in page
    assert 'id="lost"' not in page


def test_hostile_metadata_is_text(tmp_path: Path, cache: Cache) -> None:
    from thresher import from_arrays

    rng = np.random.default_rng(0)
    table = {
        ATTACK: [ATTACK if i % 2 else "x" * 100_000 for i in range(200)],
        "b\u202eidi": ["\u202eevil\u2066", "\x00\x1b[31m"] * 100,
        "text": [f"{ATTACK} \u202e word{i % 3} " + "y" * (100_000 if i == 5 else 1) for i in range(200)],
    }
    store = from_arrays(rng.standard_normal((200, 8)).astype("f4"), table=table, captions="text")
    selection = run_steps(store, [build("random", {"keep": "50%"})], cache=cache)
    page, found = read(write_report(selection, tmp_path / "r.html", store=store, cache=cache))
    assert ATTACK[:30] in found.text
    assert not set("\u202e\u2066\x00\x1b") & set(page)
    assert len(page) < 1_000_000


def test_the_script_runs(tmp_path: Path) -> None:
    """Node checks the syntax where it is installed; the browser tests of ``view`` run pages."""
    import shutil

    node = shutil.which("node")
    assert SCRIPT.startswith('"use strict";')
    if node is not None:
        (tmp_path / "page.js").write_text(SCRIPT)
        done = subprocess.run([node, "--check", str(tmp_path / "page.js")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Selection, EmbeddingStore, Cache]:
    """A selection of a pool some of whose vectors cannot be read, none of them part of its fingerprint."""
    n, path, cache = 6_400, tmp_path / "pool.parquet", Cache.at(tmp_path / "cache")
    values = np.random.default_rng(0).normal(size=n * 8).astype(np.float32)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), 8)
    captions = [f"a dog number {i}" for i in range(n)]
    table = pa.table({"key": [f"k{i}" for i in range(n)], "caption": captions, "image_embedding": vectors})
    pq.write_table(table, path, use_dictionary=False, row_group_size=50)
    selection = run_steps(open_store(str(path)), [build("semdedup", {"eps": 0.1, "clusters": 4})], cache=cache)
    data, stat = bytearray(path.read_bytes()), path.stat()
    written = pq.ParquetFile(path).metadata
    fingerprint = {int(row) // 50 for row in np.linspace(0, n - 1, 64)}
    for group in {*range(written.num_row_groups)} - fingerprint:
        chunk = written.row_group(group).column(2)
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return selection, open_store(str(path)), Cache.at(tmp_path / "other")


def test_vectors_that_cannot_be_read_leave_a_page_that_says_so(
    damaged: tuple[Selection, EmbeddingStore, Cache], tmp_path: Path
) -> None:
    selection, store, cache = damaged
    said: list[str] = []
    page = read(write_report(selection, tmp_path / "r.html", store=store, cache=cache, say=said.append))[0]
    assert len(said) == 1
    assert said[0].startswith("Without typical rows of clusters and without a map, since vectors cannot be read: ")
    assert "pool.parquet" in said[0]
    assert said[0] in unescape(page)
    assert '<li><a href="#map">' in page
    assert '<svg viewBox="0 0 1000 1000"' not in page
    assert "a dog number" in page, "captions are still shown"


def test_other_damage_is_not_taken_for_that_of_vectors(damaged: tuple[Selection, EmbeddingStore, Cache]) -> None:
    said: list[str] = []

    def work(store: EmbeddingStore | None) -> None:
        raise PoolError("the captions are damaged")

    with pytest.raises(PoolError, match="the captions are damaged"):
        with_vectors(damaged[1], work, said.append)
    assert said == []


def test_a_comparison_says_it_too(damaged: tuple[Selection, EmbeddingStore, Cache], tmp_path: Path) -> None:
    selection, store, _ = damaged
    said: list[str] = []
    chosen = {"a": selection, "b": selection.recut(eps=0.2)}
    page = read(write_comparison(chosen, tmp_path / "r.html", store=store, say=said.append))[0]
    assert len(said) == 1
    assert said[0] in unescape(page)
