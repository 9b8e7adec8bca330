"""The covariance error of selections: against slow sums, whatever runs it, and where classes are odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ops.test_covariance import pairs, slow
from thresher import Cache, EmbeddingStore, Engine, Options, Run, Selection, Serial, build, make_engine, open_store
from thresher.cli.main import main
from thresher.errors import UsageError
from thresher.pruning import covariance
from thresher.pruning.covariance import CovarianceError, Deviation, covariance_errors
from thresher.report import write_report

N = 600


@pytest.fixture
def two() -> tuple[np.ndarray, np.ndarray]:
    return pairs(N, dim=12, text_dim=12)


@pytest.fixture
def labels() -> np.ndarray:
    """Classes of many sizes; a class of one row, a number without rows, and rows in no class."""
    found = np.sort(np.random.default_rng(1).integers(0, 7, N)) ** 2
    found[:50], found[-1] = -1, 50
    return np.random.default_rng(2).permutation(found).astype(np.int32)


def chosen(store: EmbeddingStore, mask: np.ndarray, repeats: np.ndarray | None = None) -> Selection:
    start = Selection.everything(store.fingerprint(), store.layout.location, {}, store.total)
    return replace(start, dropped_by=np.where(mask, -1, 0).astype(np.int16), repeats=repeats)


def errors(
    store: EmbeddingStore,
    selection: Selection,
    labels: np.ndarray | None = None,
    engine: Engine | None = None,
    cache: Path | None = None,
) -> CovarianceError:
    where = Cache.at(cache or Path(store.layout.location).parent / "cache")
    return covariance_errors(Run(store, selection, engine or Serial(), where), {"it": selection}, labels)["it"]


def reference(
    image: np.ndarray, text: np.ndarray, weights: np.ndarray, labels: np.ndarray
) -> tuple[list[float], list[float]]:
    """Overall and within-class errors, centred and not, by the definition."""
    ones = np.ones(len(image))
    sets = [slow(image, text, ones), slow(image, text, weights)]
    overall = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(*sets, strict=True)]
    parts = np.zeros((2, 2))
    for k in np.unique(labels[labels >= 0]):
        of = labels == k
        sets = [slow(image[of], text[of], w[of]) for w in (ones, weights)]
        for j, (a, b) in enumerate(zip(*sets, strict=True)):
            parts[j] += of.sum() * np.array([np.linalg.norm(a - b), np.linalg.norm(a)])
    return overall, (parts[:, 0] / parts[:, 1]).tolist()


def figures(found: CovarianceError) -> list[Any]:
    told = [found.overall, found.overall_uncentred, found.within, found.within_uncentred]
    return [value.error for value in told if value is not None]


@pytest.mark.parametrize("task", [32, 100, 8_192])
def test_figures_are_those_of_the_definition(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covariance, "_TASK", task)
    image, text = two
    store = pool(image, text)
    repeats = np.random.default_rng(3).choice([0, 0, 1, 2, 5], N).astype(np.int32)
    for weights in (repeats, np.minimum(repeats, 1)):
        selection = chosen(store, weights > 0, weights if weights.max() > 1 else None)
        found = errors(store, selection, labels, cache=Path(store.layout.location).parent / str(task))
        overall, within = reference(image, text, weights, labels)
        np.testing.assert_allclose(figures(found), [*overall, *within], rtol=2e-5)
        assert (found.rows, found.kept) == (N, np.count_nonzero(weights))
        assert (found.classes, found.classed) == (len(np.unique(labels)) - 1, np.count_nonzero(labels >= 0))
        assert found.within is not None
        parts = found.sizes_K * found.errors_K
        assert parts.sum() / (found.sizes_K * found.norms_K).sum() == pytest.approx(found.within.error)
        shares = [entry.share for entry in found.worst(100)]
        assert sum(shares) == pytest.approx(1)
        assert shares == sorted(shares, reverse=True)


def test_everything_is_preserved_exactly(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covariance, "_TASK", 64)
    store = pool(*two)
    for repeats in (None, np.ones(N, np.int32)):
        found = errors(store, chosen(store, np.ones(N, np.bool_), repeats), labels)
        assert figures(found) == [0.0, 0.0, 0.0, 0.0]
        assert found.overall == Deviation(0.0, 0.0)
        assert found.overall.ratio is None
        assert found.worst(5) == []


def test_nothing_depends_on_where_it_runs_nor_on_the_files(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, tmp_path: Path
) -> None:
    image, text = (rows.astype(np.float16) for rows in two)
    mask = np.random.default_rng(4).random(N) < 0.3
    stores = [
        pool(image, text, name="one"),
        pool(image, text, name="seven", files=7),
        pool(image, text, name="parquet", files=3, parquet=True),
    ]
    first = errors(stores[0], chosen(stores[0], mask), labels)
    for i, store in enumerate(stores):
        for engine in (make_engine("threads", 3), *([make_engine("processes", 2)] if i == 1 else [])):
            found = errors(store, chosen(store, mask), labels, engine, tmp_path / f"{i} {type(engine).__name__}")
            assert figures(found) == figures(first)
            np.testing.assert_array_equal(found.errors_K, first.errors_K)


def test_several_selections_in_one_pass_and_from_the_cache(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pool(*two)
    masks = {name: np.random.default_rng(seed).random(N) < 0.4 for seed, name in enumerate("abc")}
    selections = {name: chosen(store, mask) for name, mask in masks.items()}
    alone = {name: figures(errors(store, s, labels, cache=Path(f"{store.layout.location}-{name}")))
             for name, s in selections.items()}  # fmt: skip
    run = Run(store, selections["a"], Serial(), Cache.at(f"{store.layout.location}-cache"))
    some = covariance_errors(run, {"a": selections["a"], "b": selections["b"]}, labels)
    passes: list[int] = []
    real = covariance._pass
    monkeypatch.setattr(covariance, "_pass", lambda *of: (passes.append(len(of[2])), real(*of))[1])
    found = covariance_errors(run, selections, labels)
    assert passes == [1]
    again = covariance_errors(run, selections, labels)
    assert passes == [1]
    for name in "abc":
        assert figures(found[name]) == figures(again[name]) == alone[name]
    assert figures(some["b"]) == alone["b"]
    covariance_errors(run, selections, np.roll(labels, 1))
    assert passes == [1, 3]


def test_a_class_of_which_nothing_was_kept_counts_in_full(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray
) -> None:
    store = pool(*two)
    found = errors(store, chosen(store, labels != 4), labels)
    lost = next(entry for entry in found.worst(100) if entry.label == 4)
    assert (lost.kept, lost.error) == (0, pytest.approx(1))
    assert found.header()["classes_lost"] == 1
    nothing = errors(store, chosen(store, np.zeros(N, np.bool_)), labels)
    assert figures(nothing) == pytest.approx([1, 1, 1, 1])
    assert nothing.overall.random == pytest.approx(1)


def test_classes_of_one_row_have_nothing_to_preserve(pool: Callable[..., EmbeddingStore], two: Any) -> None:
    store = pool(*two)
    found = errors(store, chosen(store, np.arange(N) % 2 == 0), np.arange(N))
    assert found.within == Deviation(None, None)
    assert found.within_uncentred is not None
    assert found.within_uncentred.error == pytest.approx(0.5)
    json.dumps(found.header(), allow_nan=False)


def test_without_classes_there_is_the_overall_error_alone(pool: Callable[..., EmbeddingStore], two: Any) -> None:
    image, text = two
    store = pool(image, text)
    mask = np.arange(N) % 3 == 0
    found = errors(store, chosen(store, mask))
    assert found.within is found.within_uncentred is None
    np.testing.assert_allclose(figures(found), reference(image, text, mask, np.zeros(N))[0], rtol=2e-5)
    assert found.header()["within"] is None


def test_widths_may_differ(pool: Callable[..., EmbeddingStore], labels: np.ndarray) -> None:
    image, text = pairs(N, dim=9, text_dim=4)
    store = pool(image, text)
    mask = np.arange(N) % 4 == 0
    overall, within = reference(image, text, mask, labels)
    np.testing.assert_allclose(figures(errors(store, chosen(store, mask), labels)), [*overall, *within], rtol=2e-5)


def test_rows_that_the_audit_set_aside_are_no_part_of_the_pool(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, select: Callable[..., Selection]
) -> None:
    image, text = (rows.copy() for rows in two)
    image[[3, 77]] = 0
    store = open_store(pool(image, text).layout.location, Options(skip_bad=True))
    selection = select(store, build("random", {"keep": "50%"}))
    good = np.linalg.norm(image, axis=1) > 0
    found = errors(store, selection, labels)
    assert found.rows == N - 2
    overall, within = reference(image[good], text[good], selection.mask()[good], labels[good])
    np.testing.assert_allclose(figures(found), [*overall, *within], rtol=2e-5)


@pytest.mark.parametrize("m", [12, 60, 300])
def test_the_yardstick_is_what_random_subsets_have(
    pool: Callable[..., EmbeddingStore], two: Any, labels: np.ndarray, m: int
) -> None:
    image, text = two
    store = pool(image, text)
    rng = np.random.default_rng(m)
    drawn = {str(i): chosen(store, np.isin(np.arange(N), rng.choice(N, m, replace=False))) for i in range(200)}
    run = Run(store, drawn["0"], Serial(), Cache.at(f"{store.layout.location}-cache"))
    found = list(covariance_errors(run, drawn, labels).values())
    for name in ("overall", "overall_uncentred", "within", "within_uncentred"):
        told = {getattr(error, name).random for error in found}
        assert len(told) == 1
        mean = np.mean([getattr(error, name).error for error in found])
        # The yardstick is a root mean square, which is a little above the mean.
        assert 0.97 < mean / told.pop() < 1.01, name


def test_pools_and_labels_that_do_not_fit_are_refused(pool: Callable[..., EmbeddingStore], two: Any) -> None:
    image, text = two
    alone = pool(image, name="alone")
    mask = np.ones(N, np.bool_)
    with pytest.raises(UsageError, match="needs image and text embeddings; .*alone has image$"):
        errors(alone, chosen(alone, mask))
    store, other = pool(image, text, name="a"), pool(text, image, name="b")
    with pytest.raises(UsageError, match="another pool"):
        errors(store, chosen(other, mask))
    with pytest.raises(UsageError, match="599 labels for a pool of 600 rows"):
        errors(store, chosen(store, mask), np.zeros(N - 1, int))


@pytest.fixture
def folders(
    pool: Callable[..., EmbeddingStore], two: Any, select: Callable[..., Selection], tmp_path: Path
) -> dict[str, str]:
    store = pool(*two)
    made = {
        "random": select(store, build("random", {"keep": "30%"})),
        "density": select(store, build("density", {"keep": "30%", "clusters": 6})),
    }
    return {name: str(selection.save(tmp_path / name)) for name, selection in made.items()}


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(words))
    return code, *capsys.readouterr()


def test_compare_tells_a_table(folders: dict[str, str], capsys: Any, tmp_path: Path) -> None:
    code, out, _ = told(capsys, "compare", *folders.values(), "--covariance", "--quiet")
    assert code == 0
    lines = out.splitlines()[-7:]
    assert lines[0].endswith("relative error to the 600 rows of the pool; within 6 clusters of 600 rows:")
    assert lines[1].split() == ["centred", "rows", "overall", "random", "ratio", "within", "random", "ratio", "lost"]
    assert lines[4].split()[:2] == ["not", "centred"]
    assert len({len(line) for line in lines[1:]}) == 1
    code, out, _ = told(capsys, "compare", *folders.values(), "--covariance", "--json", "--worst", "2")
    found = json.loads(out)["covariance"]
    assert list(found) == list(folders.values())
    for line, name in zip(lines[2:4], found, strict=True):
        entry = found[name]
        assert line.split()[1:3] == ["180", f"{entry['overall']['error']:.4f}"]
        assert entry["overall"]["ratio"] == pytest.approx(entry["overall"]["error"] / entry["overall"]["random"])
        assert len(entry["worst"]) == 2


def test_compare_takes_one_selection_for_its_covariance(folders: dict[str, str], capsys: Any, tmp_path: Path) -> None:
    code, _, err = told(capsys, "compare", folders["random"])
    assert code == 2
    assert "at least two selections, or --covariance" in err
    code, out, _ = told(capsys, "compare", folders["random"], "--covariance", "--quiet")
    assert code == 0
    assert "pass --clusters DIR for the error within clusters" in out
    assert "within" not in out.splitlines()[2]
    assert main(["cluster", str(tmp_path / "pool"), "-o", str(tmp_path / "c"), "--clusters", "4", "--quiet"]) == 0
    words = ["compare", folders["random"], "--covariance", "--quiet", "--clusters", str(tmp_path / "c")]
    assert "within 4 clusters of 600 rows" in told(capsys, *words)[1]


def test_compare_finds_a_pool_that_was_moved(folders: dict[str, str], capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "pool").rename(tmp_path / "moved")
    code, _, err = told(capsys, "compare", folders["random"], "--covariance")
    assert code == 2
    assert "--pool" in err
    assert told(capsys, "compare", folders["random"], "--covariance", "--pool", str(tmp_path / "moved"))[0] == 0


def test_the_report_shows_it_when_asked(folders: dict[str, str], capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert told(capsys, "report", folders["density"], "-o", str(page))[0] == 0
    assert 'id="covariance"' not in page.read_text()
    assert "thresher report --covariance" in page.read_text()
    words = ["report", folders["density"], "-o", str(page), "--overwrite", "--covariance", "--quiet"]
    assert told(capsys, *words)[0] == 0
    text = page.read_text()
    section = text[text.index('id="covariance"') :].partition("</section>")[0]
    assert "thresher report --covariance" not in text
    found = json.loads(told(capsys, "compare", folders["density"], "--covariance", "--json")[1])
    entry = found["covariance"][folders["density"]]
    for name in ("overall", "within", "overall_uncentred", "within_uncentred"):
        assert f"<td>{entry[name]['error']:.4f}</td><td>{entry[name]['random']:.4f}</td>" in section
    assert section.count('<th scope="row" class="left"><span class="named">') == min(6, len(entry["worst"]))
    for extra, said in ((["--without-pool"], "remove --without-pool"), ([], "")):
        code, _, err = told(capsys, *words, *extra)
        assert (code == 0) == (not said)
        assert said in err
    code, _, err = told(capsys, "report", folders["density"], "-o", str(page), "--overwrite", "--clusters", "x")
    assert code == 2
    assert "--clusters needs --covariance" in err


@pytest.mark.slow
def test_the_report_from_python(pool: Callable[..., EmbeddingStore], two: Any, tmp_path: Path) -> None:
    store = pool(*two)
    selection = chosen(store, np.ones(N, np.bool_))
    found = errors(store, selection)
    page = write_report(selection, tmp_path / "all.html", store=store, covariance=found)
    assert "Pass --clusters" in page.read_text()
