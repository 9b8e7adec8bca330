"""``Selection.recut``: the selection made anew, without reading a vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thresher as th
from tests.golden.update import golden_store
from thresher.pruning.registry import METHODS

# Method -> parameters, and changes of them; None if another cut needs vectors.
CUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None]] = {
    "c-rho": ({"proxy": "width", "keep": "30%"}, [{"keep": 50}, {"threshold": -400.0}]),
    "clip-score": ({"keep": "30%"}, [{"keep": "60%"}, {"threshold": 0.4}]),
    "clipcov": ({"keep": "30%", "clusters": 5}, None),
    "combine": ({"columns": "clip-score, width=-0.5", "keep": "30%"}, [{"keep": 100}, {"threshold": 0.1}]),
    "dedup": ({"column": "width"}, [{"column": "original_width"}]),
    "density": ({"keep": "30%", "clusters": 5}, [{"keep": "50%"}, {"keep": 9, "temperature": 1}, {"order": "easy"}]),
    "filter": ({"where": "width > 300"}, [{"where": "width > 500"}]),
    "herd": ({"keep": "30%", "clusters": 5}, None),
    "hkmeans": ({"keep": "30%"}, [{"keep": "50%"}, {"keep": 9}]),
    "match": ({"keep": "30%", "clusters": 5}, [{"keep": "50%"}, {"keep": 100, "order": "hard"}]),
    "metaclip": ({"keep": "30%"}, [{"keep": "50%"}, {"keep": None, "t": 40.0}]),
    "negclip": ({"keep": "30%"}, [{"keep": 77}, {"threshold": -0.2}]),
    "normsim": ({"keep": "30%"}, [{"keep": "10%"}, {"threshold": 0.2}]),
    "random": ({"keep": "30%"}, [{"keep": 1}, {"keep": "100%"}]),
    "scs": ({"draws": "30%"}, [{"draws": 3000}, {"temperature": 0.2}]),
    "semdedup": ({"eps": 0.2, "clusters": 5}, [{"eps": 0.1}, {"eps": 0.4}, {"keep": "50%"}]),
    "ssp": ({"keep": "30%", "clusters": 5}, [{"keep": "60%"}, {"keep": 20, "balance": 0.5}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[th.EmbeddingStore, th.Cache]:
    folder = tmp_path_factory.mktemp("recut")
    return golden_store(folder / "pool"), th.Cache.at(folder / "cache")


def same(a: th.Selection, b: th.Selection) -> None:
    assert a.header() == b.header()
    np.testing.assert_array_equal(a.dropped_by, b.dropped_by)
    np.testing.assert_array_equal(a.repeats, b.repeats)
    for one, other in zip(a.steps, b.steps, strict=True):
        for kind in ("rows", "groups", "reference"):
            assert getattr(one, kind).keys() == getattr(other, kind).keys()
            for name, array in getattr(one, kind).items():
                np.testing.assert_array_equal(array, getattr(other, kind)[name])


def refuse_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("a vector is read")

    from thresher.io.npy import NpyPiece

    for name in ("read", "take", "stream"):
        monkeypatch.setattr(NpyPiece, name, refused)


def made_with(parameters: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    cuts = {"keep", "threshold", "eps"}
    return {k: v for k, v in parameters.items() if not (k in cuts and cuts & changes.keys())} | changes


def test_every_method_is_in_the_table() -> None:
    assert {*CUTS} == {*METHODS.all()}


@pytest.mark.parametrize("name", list(CUTS))
def test_another_cut_is_the_selection_made_anew(name: str, pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cache = pool
    parameters, changed = CUTS[name]
    how = {"seed": 3, "cache": cache, "engine": th.Serial()}
    first = th.SemDeDup(eps=0.02, clusters=4)
    kept = th.run_steps(store, [first, th.build(name, parameters)], **how)
    loaded = replace(kept, source=None)
    for changes in changed or [{"keep": "50%"}]:
        if changed is None:
            with pytest.raises(th.UsageError, match=rf"{name} with keep = 50% is more than another cut of what is in"):
                kept.recut(**changes)
            continue
        expected = th.run_steps(store, [first, th.build(name, made_with(parameters, changes))], **how)
        store.fingerprint(), store.version()
        with monkeypatch.context() as patch:
            refuse_reads(patch)
            same(kept.recut(**changes), expected)
            if changes.keys() <= {*parameters, "threshold"}:
                same(kept.recut(**changes).recut(**parameters), kept)
        same(loaded.recut(cache=cache.folder, **changes), expected)


def test_what_needs_vectors_is_refused(pool: Any) -> None:
    store, cache = pool
    kept = th.run_steps(store, [th.SemDeDup(eps=0.2, clusters=5, against="kept")], cache=cache)
    for changes in ({"eps": 0.1}, {"clusters": 6}, {"embedding": "text"}):
        with pytest.raises(th.UsageError, match=r"is more than another cut .* select again$"):
            kept.recut(**changes)
    with pytest.raises(th.UsageError, match="is more than another cut"):
        replace(kept, source=None).recut(eps=0.2, cache=Path(cache.folder) / "other")


def test_wrong_parameters_say_what_there_is(pool: Any, rows: Callable[..., np.ndarray]) -> None:
    store, cache = pool
    kept = th.run_steps(store, [th.Random(keep="30%")], cache=cache)
    with pytest.raises(th.UsageError, match=r"random has no parameter 'eps'; it has keep"):
        kept.recut(eps=0.2)
    with pytest.raises(th.UsageError, match="give the parameters of the last step"):
        kept.recut()
    with pytest.raises(th.BudgetError, match="random: cannot keep 1,501 rows of the 1,500"):
        kept.recut(keep=1501)
    union = kept | th.run_steps(store, [th.Random(keep="30%")], seed=1, cache=cache)
    with pytest.raises(th.UsageError, match="the last step is 'union', which is not a method"):
        union.recut(keep=3)


def test_a_repeat_of_an_earlier_step_is_not_lost(pool: Any) -> None:
    store, cache = pool
    drawn = th.run_steps(store, [th.SoftCapSampling(draws=2000), th.Random(keep="50%")], cache=cache)
    with pytest.raises(th.UsageError, match="an earlier step repeats rows"):
        drawn.recut(keep="40%")


def test_a_changed_pool_is_refused(tmp_path: Path) -> None:
    store = golden_store(tmp_path / "pool")
    kept = th.run_steps(store, [th.Random(keep="30%")])
    path = tmp_path / "pool" / "image_0.npy"
    array = np.load(path, allow_pickle=False)
    array[::7] *= -1
    np.save(path, array)
    with pytest.raises((th.UsageError, th.PoolError), match="has changed"):
        kept.recut(keep="20%")


@pytest.mark.slow
def test_a_million_rows_are_cut_in_a_moment(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    store = th.from_arrays(rng.standard_normal((1_000_000, 8), np.float32))
    cache = th.Cache.at(tmp_path / "cache")
    kept = th.run_steps(store, [th.Density(keep="30%", clusters=100)], cache=cache)
    assert len(kept.recut(keep="20%")) == 200_000


def test_another_eps_does_not_sort_again(
    pool: tuple[th.EmbeddingStore, th.Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    from thresher.ops import cut

    store, cache = pool
    kept = th.select(store, th.SemDeDup(eps=0.2, clusters=5), cache=cache, progress=False)
    anew = th.select(store, th.SemDeDup(eps=0.1, clusters=5), cache=cache, progress=False)

    def refused(*args: Any) -> Any:
        raise AssertionError("rows are sorted")

    monkeypatch.setattr(cut.np, "argsort", refused)
    same(kept.recut(eps=0.1), anew)
