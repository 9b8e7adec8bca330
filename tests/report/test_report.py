"""The report: one page that loads nothing, escapes everything and shows the numbers."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from thresher import Cache, EmbeddingStore, Selection, Step, build, open_store, run_steps
from thresher.cli.text import explanation
from thresher.errors import PoolError, UsageError
from thresher.pool.layout import Options
from thresher.pruning.registry import METHODS
from thresher.report import write_report
from thresher.report.examples import SIDE, data_uri, look_up
from thresher.report.explain import explain
from thresher.report.facts import (
    clusters,
    extremes,
    histogram,
    judged,
    legible,
    pairs,
    plain,
    repeats,
    seeds,
    strips,
    worded,
    words,
)
from thresher.runtime.format import percent

ROWS = 300
ATTACK = '<script>alert(1)</script><img src="http://evil.example/x.png">'
VOID = {"meta", "img", "br", "path", "use", "rect", "image", "circle", "line", "input"}
SCRIPT = files("thresher.report").joinpath("page.js").read_text(encoding="utf-8").strip()


def picture(seed: int, kind: str = "PNG", side: int = 120, **more: Any) -> bytes:
    """An image of 36 plain squares; noise would take much longer to encode, for every thumbnail of every page."""
    squares = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST).save(out, kind, **more)
    return out.getvalue()


def write_pool(folder: Path, image: pa.Array | None, captions: list[str], name: str = "image", seed: int = 0) -> Path:
    """Ten tight knots of rows, so that there are duplicates and clusters."""
    rng = np.random.default_rng(seed)
    knots = rng.normal(size=(10, 16))
    vectors = [knots[np.arange(ROWS) % 10] + rng.normal(size=(ROWS, 16)) * scale for scale in (0.12, 0.3)]
    columns = {
        role: pa.FixedSizeListArray.from_arrays(pa.array(v.astype(np.float32).ravel()), 16)
        for role, v in zip(("image_embedding", "text_embedding"), vectors, strict=True)
    }
    columns |= {"uid": pa.array([f"key-{i:04d}" for i in range(ROWS)]), "text": pa.array(captions)}
    columns["width"] = pa.array(np.arange(ROWS))
    if image is not None:
        columns[name] = image
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "part-0.parquet", row_group_size=64)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "a-comment-of-the-original")
    images = [{"bytes": picture(i, pnginfo=note), "path": None} for i in range(ROWS)]
    captions = [f"{ATTACK} number {i} " + "word " * 60 for i in range(ROWS)]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return write_pool(tmp_path_factory.mktemp("pools") / "emoji & co", pa.array(images, struct), captions)


@pytest.fixture(scope="module")
def store(pool: Path) -> EmbeddingStore:
    return open_store(str(pool))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache.at(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def chain(store: EmbeddingStore, cache: Cache) -> Selection:
    steps = [
        build("filter", {"where": "width >= 20 AND text LIKE '%number%'"}),
        build("semdedup", {"keep": "80%", "clusters": 9}),
        build("clip-score", {"keep": "70%"}),
        build("density", {"keep": "50%", "clusters": 8}),
    ]
    return run_steps(store, steps, cache=cache)


@pytest.fixture(scope="module")
def written(chain: Selection, store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of ``chain`` as it is by default."""
    return write_report(chain, tmp_path_factory.mktemp("written") / "deep" / "report.html", store=store)


class Checker(HTMLParser):
    """Collects what a browser would load or run, and whether tags close."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
                self.loads.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> tuple[str, Checker]:
    """Return a page after checking what must hold for every page."""
    page = path.read_text(encoding="utf-8")
    found = Checker()
    found.feed(page)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert all(load.startswith(("data:image/", "#")) for load in found.loads)
    assert {load[1:] for load in found.loads if load.startswith("#")} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(found.ids)
    # The only script is ours, and the policy of the page permits no other.
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert scripts in ([], [SCRIPT])
    assert page.count("<script") == len(scripts)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    own = f"; script-src 'sha256-{allowed}'" if scripts else ""
    assert policy[1] == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'{own}"
    assert not found.tags & {"link", "iframe", "object", "embed", "form", "base"}
    assert "@import" not in page
    assert "url(http" not in page
    assert "<!--" not in page
    return page, found


def test_page_shows_the_funnel(chain: Selection, written: Path) -> None:
    page, found = read(written)
    assert written.parts[-2:] == ("deep", "report.html")
    assert [p.name for p in written.parent.iterdir()] == ["report.html"]
    for step in chain.steps:
        for count in (step.rows_in, step.rows_out, step.rows_in - step.rows_out):
            assert f"<td>{count:,}</td>" in page
        assert f"<td>{percent(step.rows_out, ROWS)}</td>" in page
    assert f"<b>{len(chain)}</b> <span>of {ROWS} rows kept, {percent(len(chain), ROWS)}" in page
    assert (
        page.count("<svg") == 8 + 2 + 1
    )  # funnel; scores of three steps; two of each of two clusterings; sliders; map
    assert found.text.count("Move the cut") == 2
    assert "Selection from emoji & co" in found.text
    assert "fails: (width &gt;= 20)" in page
    assert chain.store in page
    assert '"method": "density"' in found.text
    for heading in ("Nearest first", "Nearest to the threshold", "Most pruned", "Dropped, lowest scores"):
        assert heading in found.text
    assert "\u2026" in found.text  # long captions are cut


def test_captions_are_only_ever_text(chain: Selection, store: EmbeddingStore, tmp_path: Path) -> None:
    page, found = read(write_report(chain, tmp_path / "r.html", store=store, title=ATTACK))
    assert ATTACK in found.text
    assert "<script>alert" not in page
    assert "http://" not in page.replace("http://evil.example", "")
    assert 'title="row ' in page
    assert re.search(r'title="row \d+ · key-\d{4}"', page)


def test_same_selection_same_bytes(chain: Selection, store: EmbeddingStore, written: Path, tmp_path: Path) -> None:
    first = written.read_bytes()
    loaded = Selection.load(chain.save(tmp_path / "selection"))
    assert write_report(loaded, tmp_path / "b.html", store=store).read_bytes() == first
    within = store.where(np.arange(ROWS) < 7)  # a view shows the same rows: ids are those of the pool
    assert write_report(chain, tmp_path / "a.html", store=within).read_bytes() == first


def test_pictures_are_small_and_new(chain: Selection, store: EmbeddingStore, tmp_path: Path) -> None:
    page, _ = read(write_report(chain, tmp_path / "r.html", store=store, examples=2, cells=2))
    found = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)
    assert len(found) > 20
    for text in found:
        data = base64.b64decode(text)
        assert b"a-comment-of-the-original" not in data
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) <= SIDE


def test_examples_can_be_left_out(chain: Selection, store: EmbeddingStore, tmp_path: Path) -> None:
    page, found = read(write_report(chain, tmp_path / "r.html", store=store, examples=0, cells=0))
    assert "<img" not in page
    assert "Most pruned" not in found.text
    with pytest.raises(UsageError, match="must be 0 or more"):
        write_report(chain, tmp_path / "r.html", examples=-1)


def test_without_store(chain: Selection, tmp_path: Path) -> None:
    page, found = read(write_report(chain, tmp_path / "r.html"))
    assert "<img" not in page
    assert "alert(1)" not in page
    assert "Most pruned" in found.text


def test_store_of_another_pool(chain: Selection, tmp_path: Path) -> None:
    other = open_store(str(write_pool(tmp_path / "other", None, ["x"] * ROWS, seed=1)))
    with pytest.raises(UsageError, match="another pool"):
        write_report(chain, tmp_path / "r.html", store=other)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", METHODS.all())
def test_every_method(name: str, store: EmbeddingStore, cache: Cache, tmp_path: Path) -> None:
    known: dict[str, Any] = {"filter": {"where": "width > 9"}, "semdedup": {"eps": 0.05}}
    given = known.get(name) or getattr(METHODS.all()[name], "example", {"keep": "40%"})
    if "clusters" in {item.name for item in dataclasses.fields(METHODS.all()[name])}:  # type: ignore[arg-type]
        given = {**given, "clusters": 7}
    selection = run_steps(store, [build(name, given)], cache=cache)
    _, found = read(write_report(selection, tmp_path / "r.html", store=store))
    assert f"1. {name}" in found.text
    assert f"{len(selection)}" in found.text


def test_the_best_of_groups(store: EmbeddingStore, cache: Cache, tmp_path: Path) -> None:
    """A row that stays has no cosine to a better one, and its group is named."""
    step = build("semdedup", {"eps": 0.6, "prefer": "width", "clusters": 3})
    selection = run_steps(store, [step], cache=cache)
    evidence, mask = selection.steps[0].rows, selection.mask()
    row = int(np.flatnonzero(~mask)[0])
    best = int(evidence["duplicate_of"][row])
    size = int(evidence["group_size"][row])
    dropped, kept = (explain(selection, store, f"row:{i}")["steps"][0] for i in (row, best))
    assert dropped["group"] == kept["group"] == {"first": int(evidence["duplicate_group"][row]), "size": size}
    assert size == np.count_nonzero(evidence["duplicate_group"] == evidence["duplicate_group"][row])
    assert dropped["reason"] == f"in a group of {size} duplicates, of which row {best} is the best by width"
    assert dropped["score"] == float(evidence["score"][row])
    assert dropped["duplicate"]["row"] == best
    assert "score" not in kept
    _, found = read(write_report(selection, tmp_path / "r.html", store=store))
    assert "without a better row in their group are not shown" in found.text


def test_no_steps_and_set_algebra(store: EmbeddingStore, cache: Cache, tmp_path: Path) -> None:
    everything = Selection.everything(store.fingerprint(), "s3://bucket/pool", {}, ROWS)
    _, found = read(write_report(everything, tmp_path / "r.html", store=store))
    assert "No steps" in found.text
    a = run_steps(store, [build("random", {"keep": "50%"})], cache=cache)
    b = run_steps(store, [build("clip-score", {"keep": "50%"})], cache=cache)
    for made in (a & b, a | b, a - b, a - a, (a | b) & a):
        _, found = read(write_report(made, tmp_path / "r.html", store=store))
        assert "Combined from two selections" in found.text
        assert f"{len(made)} rows" in found.text


def test_repeats_and_skipped_rows(store: EmbeddingStore, cache: Cache, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    table = pq.read_table(Path(store.layout.location) / "part-0.parquet").drop_columns(["image"])
    keys = pa.array(["twice"] * 3 + [f"k{i}" for i in range(ROWS - 3)])
    pq.write_table(table.set_column(table.column_names.index("uid"), "uid", keys), folder / "p.parquet")
    bad = open_store(str(folder), Options(skip_bad=True))
    selection = run_steps(bad, [build("random", {"keep": "50%"})], cache=cache)
    repeats = np.where(selection.mask(), 3, 0).astype(np.int32)
    _, found = read(write_report(dataclasses.replace(selection, repeats=repeats), tmp_path / "r.html", store=bad))
    assert "its key also belongs to an earlier row" in found.text
    assert "bad rows" in found.text
    assert f"used {3 * len(selection)} times" in found.text
    assert "skip_bad = True" in found.text


def hand_made(scores: list[float], dropped: list[bool], **more: Any) -> Selection:
    step = Step(
        method="made-by-hand",
        parameters={"x": {"y": [1, 2]}},
        seed=0,
        rows_in=len(scores),
        rows_out=len(scores) - sum(dropped),
        reasons=("{score:.2f} at {cut}",),
        score='a "score" <b> of $5',
        rows={"score": np.array(scores, np.float32), **more.pop("rows", {})},
        **more,
    )
    start = Selection.everything("f", "pool\udcff", {}, len(scores))
    return start.then(step, ~np.array(dropped, np.bool_))


@pytest.mark.parametrize(
    ("scores", "apart"),
    [
        ([0.1, np.nan, -np.inf, np.inf, 0.4], 3),
        ([np.nan] * 5, None),
        ([0.5] * 5, 0),
        ([0.0] * 5, 0),
        ([-1, 1e30, 1, 2, 3], 0),
    ],
)
@pytest.mark.parametrize(
    "cut", [None, 0.3, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (np.inf, -np.inf, 7.0))]
)
def test_odd_scores(scores: list[float], apart: int | None, cut: float | None, tmp_path: Path) -> None:
    selection = hand_made(scores, [False, True, False, True, False], cut=cut)
    found = histogram(next(judged(selection)))
    if apart is None:
        assert found is None
    else:
        assert found is not None
        assert found.apart == apart
        assert found.kept.sum() + found.dropped.sum() + found.beyond == 5 - apart
    read(write_report(selection, tmp_path / "r.html"))


def test_bins_meet_at_the_cut() -> None:
    scores = np.random.default_rng(0).normal(size=4_000).astype(np.float32)
    kept = scores >= np.float32(0.31)
    found = histogram(next(judged(hand_made(scores.tolist(), (~kept).tolist(), cut=float(np.float32(0.31))))))
    assert found is not None
    assert found.kept.sum() == kept.sum()
    assert not (found.kept * found.dropped).any()


def test_evidence_that_does_not_fit(tmp_path: Path) -> None:
    selection = hand_made([1, 2, 3], [False, True, False])
    broken = dataclasses.replace(selection, dropped_by=np.array([-1, 0, 0], np.int16))
    with pytest.raises(PoolError, match="may be damaged"):
        write_report(broken, tmp_path / "r.html")


def test_pairs_show_whether_the_original_was_kept() -> None:
    twins = np.array([-1, 0, 1, -1], np.int64)
    made = hand_made([-1, 0.9, 0.95, 0.1], [False, True, True, False], rows={"duplicate_of": twins}, cut=0.5)
    near, far = pairs(next(judged(made)), 1)
    assert [(p.row, p.of, p.of_kept) for p in (*near, *far)] == [(2, 1, False), (1, 0, True)]
    assert near[0].cosine == pytest.approx(0.95)
    drawn = histogram(next(judged(made)))
    assert drawn is not None
    assert drawn.apart == 1  # the first of its cluster


def test_clusters_at_either_end() -> None:
    size = np.array([10, 4, 0, 8, 2, 100])
    kept = np.array([1, 4, 0, 8, 0, 50])
    found = clusters(next(judged(hand_made([1, 2], [False, True], groups={"size": size, "kept": kept}))))
    assert found is not None
    assert extremes(found, 2) == ([4, 0], [3, 1])
    most, least = extremes(found, 99)
    assert sorted(most + least) == [0, 1, 3, 4, 5]


def test_seeds_of_combined_selections(store: EmbeddingStore, cache: Cache) -> None:
    a, b = (run_steps(store, [build("random", {"keep": "50%"})], seed=seed, cache=cache) for seed in (3, 5))
    assert seeds(((a & b) - a).header()["steps"]) == {3, 5}


def test_many_clusters_stay_small(tmp_path: Path) -> None:
    k = 5_000
    size = np.random.default_rng(0).zipf(1.6, k).clip(0, 10_000)
    groups = {"size": size, "kept": size // 2, "complexity": np.linspace(0, 1, k)}
    selection = hand_made([1, 2], [False, True], groups=groups)
    page, _ = read(write_report(selection, tmp_path / "r.html"))
    assert len(page) < 300_000


# --- pictures of strangers ------------------------------------------------------------------------


def test_paths_stay_inside_the_pool(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(1))
    names = ["images/a.png", "../outside.png", str(outside), "images/link.png", "images/../../outside.png", "images"]
    names += ["none.png", "", "images/\0.png", "linked/outside.png", f"file://{outside}", "images/text.png"]
    names += ["images/within.png", None]  # type: ignore[list-item]
    paths = names + ["none.png"] * (ROWS - len(names))
    write_pool(folder, pa.array(paths), ["c"] * ROWS, "image_path")
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(picture(2))
    (folder / "images" / "text.png").write_text("no picture")
    (folder / "images" / "link.png").symlink_to(outside)
    (folder / "images" / "within.png").symlink_to(folder / "images" / "a.png")
    (folder / "linked").symlink_to(tmp_path)
    store = open_store(str(folder))
    assert store.layout.image == "image_path"
    found = look_up(store, range(len(names)))
    shown = [names[row] for row, example in found.items() if example.picture]
    assert shown == ["images/a.png", "images/within.png"]


def pictures() -> Iterator[tuple[str, bytes, bool]]:
    yield "jpeg", picture(1, "JPEG", side=900), True
    yield "webp", picture(1, "WEBP"), True
    yield "gif", picture(1, "GIF"), True
    yield "nothing", b"", False
    yield "noise", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), False
    yield "cut short", picture(1)[:-100], False
    flipped = bytearray(picture(1))
    flipped[len(flipped) // 2] ^= 0xFF
    yield "flipped bit", bytes(flipped), False
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    yield "bomb", bomb.getvalue(), False
    yield "program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", False
    for mode in ("1", "L", "P", "RGBA", "LA", "I;16", "CMYK"):
        out = io.BytesIO()
        Image.new(mode, (30, 400)).save(out, "TIFF")
        yield mode, out.getvalue(), True


@pytest.mark.parametrize(("data", "good"), [pytest.param(d, g, id=n) for n, d, g in pictures()])
def test_thumbnails(data: bytes, good: bool) -> None:
    found = data_uri(data)
    assert found.startswith("data:image/") is good
    if good:
        with Image.open(io.BytesIO(base64.b64decode(found.split(",")[1]))) as image:
            assert max(image.size) <= SIDE


# --- words ----------------------------------------------------------------------------------------


def test_plain_and_percent() -> None:
    assert plain("a\n\tb\u202ec\0") == "a b c"
    assert plain("\U0001f468\u200d\U0001f469 ok") == "\U0001f468\u200d\U0001f469 ok"
    assert plain("abcdef", 4) == "abc\u2026"
    assert [percent(n, 10_000) for n in (0, 1, 5_000, 9_999, 10_000)] == ["0.0%", "<0.1%", "50.0%", ">99.9%", "100.0%"]
    assert percent(0, 0) == "-"


def test_words_of_a_reason() -> None:
    found = words("row {duplicate_of}: {score:.4f} > {cut:.2f} {{x}}", 0.5)
    assert [text for text, name in found if name] == ["duplicate of", "score"]
    assert "".join(text for text, _ in found) == "row duplicate of: score > 0.50 {x}"

    assert worded("row {duplicate_of}: {score:.4f} > {cut:.2f} {{x}}", 0.5) == "row \u2026: \u2026 > 0.50 {x}"


def test_no_placeholder_is_left_in_the_page(
    chain: Selection, store: EmbeddingStore, written: Path, cache: Cache, tmp_path: Path
) -> None:
    both = chain | run_steps(store, [build("semdedup", {"eps": 0.1, "clusters": 4})], cache=cache)
    for path in (written, write_report(both, tmp_path / "r.html", store=store)):
        page, _ = read(path)
        for name in ("duplicate_of", "score", "cut", "quota", "cluster", "size"):
            assert f"{{{name}" not in page
        assert "duplicate of row \u2026: cosine \u2026" in page
    head = both.header()["steps"][0]
    assert legible(head)["parameters"]["of"][1][0]["reasons"][0] == "duplicate of row \u2026: cosine \u2026 > 0.9000"
    assert "{score" in head["parameters"]["of"][1][0]["reasons"][0]  # the selection's own is as it was


def test_repeats_of_a_reference_are_paired_with_its_rows() -> None:
    dropped = [False, True, True, True, True, False]
    cosines, of = np.array([0.2, 0.9, 0.8, 0.95, 0.3, -0.5], np.float32), np.array([-1, 4, 4, 9, -1, -1], np.int64)
    rows = {"reference": of, "reference_cosine": cosines, "duplicate_of": np.array([-1, -1, -1, -1, 0, -1])}
    keys = {"row": np.array([4, 9]), "key": np.frombuffer(b"fournine", np.uint8), "key_ends": np.array([4, 8])}
    made = hand_made([-1, 0.9, 0.8, 0.95, 0.6, 0.1], dropped, rows=rows, reference=keys, cut=0.5)
    found = repeats(next(judged(made)), 2)
    assert found is not None
    assert (found.count, found.rows, found.cut) == (3, 2, None)
    assert [(p.row, p.of, p.of_kept) for p in (*found.near, *found.far)] == [(3, 9, None), (1, 4, None), (2, 4, None)]
    assert [p.cosine for p in found.near] == pytest.approx([0.95, 0.9])
    assert found.originals == {9: {"row": 9, "key": "nine"}, 4: {"row": 4, "key": "four"}}
    assert found.histogram is not None
    assert (found.histogram.kept.sum(), found.histogram.dropped.sum()) == (3, 3)
    own = histogram(next(judged(made)))
    assert own is not None
    assert (own.kept.sum(), own.dropped.sum(), own.apart, own.elsewhere) == (1, 1, 1, 3)
    assert [(p.row, p.of) for p in pairs(next(judged(made)), 2)[0]] == [(4, 0)]
    assert repeats(next(judged(hand_made([1, 2], [False, True]))), 2) is None
    for given, cut in [({"reference_eps": 0.25, "eps": 0.5}, 0.75), ({"eps": 0.5}, 0.5), ({"eps": "much"}, None)]:
        step = dataclasses.replace(made.steps[0], parameters=given)
        found = repeats(next(judged(dataclasses.replace(made, steps=(step,)))), 0)
        assert found is not None
        assert (found.cut, found.near, found.far, found.originals) == (cut, (), (), {})


def test_whole_numbers_stand_in_the_middle_of_their_bins() -> None:
    scores = [0, 3, 1, 1, 4, 3, 0, 1]
    found = histogram(next(judged(hand_made(scores, [score > 2 for score in scores]))))
    assert found is not None
    assert found.edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5]
    assert found.kept.tolist() == [2, 3, 0, 0, 0]
    assert found.dropped.tolist() == [0, 0, 0, 2, 1]
    assert found.apart == found.beyond == 0


def test_rows_of_a_coreset_are_shown_by_what_they_were() -> None:
    step = {"code": np.array([0, 1, 2, 1, 1, 0], np.uint8), "marks": np.array([0, 1, 2, 1, 1, 0], np.uint8)}
    made = hand_made([0, 2, 3, 3, 3, 0], [False, True, True, True, True, False], rows=step)
    named = ("never a candidate: but {score:.0f}", "redundant: {score:.0f}", "ill-matched: {score:.0f}")
    made = dataclasses.replace(made, steps=(dataclasses.replace(made.steps[0], reasons=named),))
    shown = [(s.title, s.kept, [(t.row, t.score) for t in s.tiles]) for s in strips(next(judged(made)), 2)]
    assert shown == [
        ("Dropped \u00b7 redundant", False, [(3, 3), (4, 3)]),
        ("Dropped \u00b7 ill-matched", False, [(2, 3)]),
        ("Kept, lowest scores", True, [(0, 0), (5, 0)]),
    ]


@pytest.mark.parametrize(
    ("twins", "row", "told"),
    [
        ([-1, 0, 1, 2], 1, "duplicates row 0, key k0, which was kept"),
        ([-1, 0, 1, 2], 2, "duplicates row 1, key k1, which duplicates row 0, key k0, which was kept"),
        (
            [-1, 0, 1, 2],
            3,
            "duplicates row 2, key k2; this chain of 3 duplicates ends at row 0, key k0, which was kept",
        ),
        ([-1, 2, 3, 1], 1, "duplicates row 2, key k2, which duplicates row 3, key k3, which was dropped"),  # damaged
    ],
)
def test_explain_follows_duplicates_to_the_row_that_stayed(
    twins: list[int], row: int, told: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "img_emb.npy", np.eye(4, dtype=np.float32))
    pq.write_table(pa.table({"key": [f"k{i}" for i in range(4)]}), tmp_path / "meta.parquet")
    store = open_store(str(tmp_path))
    chain = hand_made([0.9] * 4, [twin >= 0 for twin in twins], rows={"duplicate_of": np.array(twins)}, cut=0.5)
    found = explain(chain, store, f"row:{row}")
    assert any(told in line for line in explanation(found))


def test_joiners_of_words_and_emoji_stay_and_control_characters_are_escaped(tmp_path, chain, store) -> None:
    joined = "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e"
    step = dataclasses.replace(chain.steps[0], notes=(f"{joined} \x1b[31m \u202e",))
    noted = dataclasses.replace(chain, steps=(step, *chain.steps[1:]))
    page = write_report(noted, tmp_path / "page.html", store=store).read_text(encoding="utf-8")
    assert joined in page
    assert "\\u200d" not in page
    assert "\\u202e" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
