"""Sections of the report: the map, what was lost, names of clusters, and cuts that can be moved."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.report.test_report import ATTACK, ROWS, SCRIPT, picture, read, write_pool
from thresher import Cache, EmbeddingStore, Selection, build, open_store, run_steps
from thresher.report import write_report
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
