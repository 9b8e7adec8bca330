"""What results show in a notebook: self-contained, escaped, bounded, and never an error."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import thresher as th
from tests.runs import make_run
from thresher.report.notebook import MOST
from thresher.runtime import progress as bars

POOL = str(Path(__file__).parents[2] / "examples" / "twemoji")
QUIET: dict[str, Any] = {"progress": False}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202eevil\x1b[31m{{ 7*7 }}"


class Seen(HTMLParser):
    """The elements of a page, checked to be closed and to run and load nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "link", "object", "a", "base", "form")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "srcset")
            assert name != "src" or str(value).startswith("data:image/webp;base64,")
        self.images += tag == "img"
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data
        else:
            assert not re.search(r"url\(|@import|https?:", data)


@pytest.fixture(scope="module")
def kept() -> th.Selection:
    return th.select(POOL, th.SemDeDup(eps=0.15, clusters=20), th.Density(keep="40%", clusters=20), **QUIET)


def test_a_selection_shows_its_steps_reasons_and_pictures(kept: th.Selection) -> None:
    seen = Seen(kept._repr_html_())
    first, second = kept.steps
    for number in (len(kept), kept.total, first.rows_out, second.rows_out, first.rows_in - first.rows_out):
        assert f"{number:,}" in seen.text
    assert "semdedup clusters = 20, eps = 0.15" in seen.text
    assert "to meet the budget" not in seen.text, "semdedup with eps has no budget: that reason dropped no row"
    assert "duplicate of row" in seen.text
    assert "distance to its centroid" in seen.text
    assert seen.images == 2 * 3 + 6
    assert POOL not in kept._repr_html_()


def test_a_gallery_has_the_pairs_nearest_to_the_threshold_or_the_clearest(kept: th.Selection) -> None:
    step = kept.steps[0]
    scores, twins = np.asarray(step.rows["score"]), np.asarray(step.rows["duplicate_of"])
    gone = np.flatnonzero(kept.dropped_by == 0)
    for first, order in (("borderline", scores[gone]), ("clear", -scores[gone])):
        shown = Seen(kept.show("semdedup", 12, first=first).html)
        pairs = [(int(a), int(b)) for a, b in re.findall(r"row (\d+) repeats\s*row (\d+)", shown.text)]
        assert len(pairs) == 12
        assert shown.images == 24
        assert all(twins[a] == b and kept.dropped_by[a] == 0 for a, b in pairs)
        found = [scores[a] for a, _ in pairs]
        assert found == sorted(found, reverse=first == "clear")
        assert found[0] == scores[gone[np.argmin(order)]]


def test_a_gallery_of_scores_begins_at_the_cut() -> None:
    kept = th.select(POOL, th.ClipScore(keep="50%"), **QUIET)
    scores = np.asarray(kept.steps[0].rows["score"])
    gone = np.flatnonzero(~kept.mask())
    for first, sign in (("borderline", -1), ("clear", 1)):
        text = Seen(kept.show("clip-score", 5, first=first).html).text
        shown = [float(x) for x in re.findall(r"clip score (-?\d\.\d+) is below", text)]
        wanted = np.sort(sign * scores[gone])[:5] * sign
        np.testing.assert_allclose(shown, wanted, atol=6e-5)


def test_a_gallery_without_a_name_has_rows_of_every_step(kept: th.Selection) -> None:
    text = Seen(kept.show(n=8).html).text
    assert "Dropped by 1. semdedup" in text
    assert "Dropped by 2. density" in text
    assert repr(kept.show(2, 3)).startswith(
        f"Gallery({kept.steps[1].rows_in - kept.steps[1].rows_out:,} rows dropped by"
    )


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda kept: kept.show("semdedupe"), r"no such step; there are 1 \(semdedup\), 2 \(density\).*semdedup"),
        (lambda kept: kept.show(3), "dropped_by = 3: no such step"),
        (lambda kept: kept.show(True), "dropped_by = True"),
        (lambda kept: kept.show(n=0), "n = 0: give a number from 1 to 200"),
        (lambda kept: kept.show(n=MOST + 1), "from 1 to 200"),
        (lambda kept: kept.show(n=2.5), "n = 2.5"),
        (lambda kept: kept.show(first="last"), 'give "borderline" or "clear"'),
        (lambda kept: kept.plot("nothing"), "step = 'nothing': no such step"),
        (lambda kept: th.open(POOL).show([3953]), "no row 3,953; give row numbers from 0 to 3,952"),
        (lambda kept: th.open(POOL).show([-1]), "no row -1"),
        (lambda kept: th.open(POOL).show(range(201)), "201 rows are too many"),
        (lambda kept: th.open(POOL).show(["a"]), "give row numbers, a slice, or a mask"),
        (lambda kept: th.open(POOL).show([True, False]), "give row numbers, a slice, or a mask"),
        (lambda kept: th.open(POOL).show(None, 0), "n = 0"),
    ],
)
def test_what_cannot_be_shown_is_one_line(kept: th.Selection, ask: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(th.UsageError, match=told) as caught:
        ask(kept)
    assert "\n" not in str(caught.value)


def test_rows_of_a_store() -> None:
    store = th.open(POOL)
    mask = np.zeros(len(store), np.bool_)
    mask[[5, 7]] = True
    for rows, wanted in (([7, 5], [7, 5]), (np.array([3]), [3]), (4, [4]), (slice(0, 3), [0, 1, 2]), (mask, [5, 7])):
        seen = Seen(store.show(rows).html)
        assert [int(n) for n in re.findall(r"row (\d+)\b", seen.text)] == wanted
        assert seen.images == len(wanted)
    assert Seen(store.show(n=9).html).images == 9
    seen = Seen(store._repr_html_())
    assert "3,953 rows" in seen.text
    assert "256 dimensions" in seen.text
    assert Seen(store.where(mask)._repr_html_()).images == 2


def test_clusters_show_the_rows_nearest_to_the_centroid_and_the_farthest() -> None:
    groups = th.cluster(POOL, 20, **QUIET)
    inside = np.flatnonzero(groups.labels_N == 3)
    inside = inside[np.argsort(groups.distances_N[inside], kind="stable")]
    page = groups.show(3, 6).html
    titles = [int(n) for n in re.findall(r'title="row (\d+)', page)]
    assert titles == [*inside[:3], *inside[::-1][:3]]
    assert Seen(groups._repr_html_()).images == 36
    with pytest.raises(th.UsageError, match="no cluster 20; give a number from 0 to 19"):
        groups.show(20)
    bare = th.Groups(groups.labels_N, groups.distances_N, groups.centroids_KD)
    assert Seen(bare._repr_html_()).images == 0
    with pytest.raises(th.UsageError, match="do not know their pool"):
        bare.show(3)
    assert bare.show(3, 6, pool=th.open(POOL)).html == page


def test_scores_comparisons_and_steps(kept: th.Selection) -> None:
    table = th.score(POOL, "clip-score", **QUIET)
    seen = Seen(table._repr_html_())
    assert f"{table.values_n.max():.4f}" in seen.text
    assert seen.images == 12
    assert repr(table) == "ScoreTable(clip-score: 3,953 rows)"
    other = th.select(POOL, th.Random(keep="30%"), **QUIET)
    compared = th.compare({HOSTILE: kept, "chance": other})
    text = Seen(compared._repr_html_()).text
    assert f"{compared['pairs'][0]['jaccard']:.3f}" in text
    assert len(repr(compared)) < 200
    assert "\x1b" not in repr(compared)
    text = Seen(kept.steps[0]._repr_html_()).text
    assert "eps0.15" in re.sub(r"\s", "", text)


def test_captions_of_others_are_only_text(rows: Callable[..., np.ndarray]) -> None:
    vectors = rows(40, 8)
    vectors[20:] = vectors[:20]
    captions = [HOSTILE, "a" * 100_000, "</style></div><script>", *(f"caption {i}" for i in range(37))]
    keys = [f"{HOSTILE}{i}" for i in range(40)]
    store = th.from_arrays(image=vectors, keys=keys, table={"caption": captions}, captions="caption",
                           images=lambda row: b"not an image" if row else None)  # fmt: skip
    kept = th.select(store, th.SemDeDup(eps=0.05, clusters=2), **QUIET)
    for page in (kept._repr_html_(), kept.show(n=40).html, store._repr_html_(), store.show(range(40)).html):
        seen = Seen(page)
        assert seen.images == 0
        assert "\u202e" not in page
        assert "\x1b" not in page
        assert "a" * 200 not in page
        assert "49" not in seen.text.partition("7*7")[0][-20:]
        assert page.count("</style>") == 1


def test_pools_without_captions_and_pictures(rows: Callable[..., np.ndarray]) -> None:
    vectors = rows(40, 8)
    vectors[20:] = vectors[:20]
    kept = th.select(vectors, th.SemDeDup(eps=0.05, clusters=2), **QUIET)
    for page in (kept._repr_html_(), kept.show().html, kept.source.store._repr_html_(), kept.source.store.show(3).html):
        assert "no image" not in Seen(page).text
    everything = th.select(vectors, th.Random(keep="100%"), **QUIET)
    assert "40 of 40 rows kept, 100.0%" in Seen(everything._repr_html_()).text
    assert "0 rows dropped" in Seen(everything.show().html).text


def test_a_pool_that_was_moved_shows_what_is_known(kept: th.Selection, tmp_path: Path) -> None:
    shutil.copytree(POOL, tmp_path / "pool")
    th.select(tmp_path / "pool", th.ClipScore(keep="50%"), **QUIET).save(tmp_path / "kept")
    shutil.move(tmp_path / "pool", tmp_path / "elsewhere")
    loaded = th.Selection.load(tmp_path / "kept")
    seen = Seen(loaded._repr_html_())
    assert "of 3,953 rows kept" in seen.text
    assert "No captions and images" in seen.text
    with pytest.raises(th.PoolError):
        loaded.show()
    assert Seen(loaded.show(n=4, pool=str(tmp_path / "elsewhere")).html).images == 4


def test_what_fails_shows_the_repr(monkeypatch: pytest.MonkeyPatch, kept: th.Selection) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("anything")

    monkeypatch.setattr("thresher.report.notebook._funnel", broken)
    assert kept._repr_html_().startswith("<pre>Selection(")


def test_no_vectors_are_read(monkeypatch: pytest.MonkeyPatch, kept: th.Selection) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("a vector is read")

    from thresher.io.parquet import ParquetPiece

    for name in ("take", "stream"):
        monkeypatch.setattr(ParquetPiece, name, refused)
    assert Seen(kept._repr_html_()).images
    assert Seen(kept.show().html).images


def test_a_plot_is_a_figure_that_pyplot_does_not_know(kept: th.Selection) -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    before = dict(rcParams)
    figure = kept.plot()
    assert isinstance(figure, Figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["pool", "1. semdedup", "2. density"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert kept.plot("semdedup").axes[0].get_xlabel() == kept.steps[0].score
    assert dict(rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
    with pytest.raises(th.UsageError, match="random records no scores"):
        th.select(POOL, th.Random(keep="10%"), **QUIET).plot("random")


def test_a_training_run(tmp_path: Path) -> None:
    training = make_run(tmp_path / HOSTILE.replace("/", ""), th.open(POOL), epochs=15, stop=14, prune=0.2, note=HOSTILE)
    page = training._repr_html_()
    seen = Seen(page)
    assert f"{training.log()[-1]['loss']:.4f}" in seen.text
    assert "the last 12 of 14" in seen.text
    assert "Not finished: 14 of 15 epochs." in seen.text
    assert "shoes <b>: R@1" in seen.text
    assert repr(training) == f"Training(clip on {training.data}: 3,953 rows, scan)".replace(POOL, repr_of(POOL))
    empty = make_run(tmp_path / "empty", th.open(POOL), stop=0)
    assert "Not finished: 0 of 7 epochs." in Seen(empty._repr_html_()).text


def repr_of(location: str) -> str:
    """The location in a repr: relative if it is inside the current folder."""
    return location.removeprefix(f"{Path.cwd()}/")


def test_progress_in_a_notebook_is_a_bar_below_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display as display

    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(display, "display", lambda data, **how: shown.append(("new", data["text/html"])))
    monkeypatch.setattr(display, "update_display", lambda data, **how: shown.append(("again", data["text/html"])))
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(kernel=object()))
    report = bars.progress_for(quiet=False)
    assert isinstance(report, bars.Cells)
    assert isinstance(bars.progress_for(quiet=True), bars.Silent)
    with report.task("fast", 10) as advance:
        advance(10)
    assert shown == []
    monkeypatch.setattr(bars, "_PATIENCE", 0.0)
    with report.task(HOSTILE, 10) as advance:
        advance(4)
        advance(4)
    assert [kind for kind, _ in shown] == ["new", "again", "again"]
    assert 'value="4" max="10"' in shown[0][1]
    assert "80.0%" in shown[1][1]
    assert shown[2][1] == ""
    assert "<script" not in shown[0][1]
    assert "\u202e" not in shown[0][1]
    report.say("first <b>")
    report.say("second")
    assert "second (and 1 earlier line)" in shown[-1][1]
    assert "first &lt;b&gt;" in shown[-1][1]
    assert "<summary" in shown[-1][1]
    assert [kind for kind, _ in shown[-2:]] == ["new", "again"]
