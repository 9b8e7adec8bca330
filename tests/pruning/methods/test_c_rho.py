from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_pool
from thresher import BadRowsError, UsageError, build


def cosines(image, text) -> np.ndarray:
    image, text = image.astype(float), text.astype(float)
    return (image * text).sum(axis=1) / np.linalg.norm(image, axis=1) / np.linalg.norm(text, axis=1)


@pytest.fixture
def pairs(rows):
    """Embeddings by a trained model and by an early one, of another width."""
    n = 120
    return (rows(n, seed=1), rows(n, seed=2)), (rows(n, dim=5, seed=3), rows(n, dim=5, seed=4))


def best(difference, k) -> list[int]:
    return sorted(sorted(range(len(difference)), key=lambda i: (-difference[i], i))[:k])


def test_two_columns(pool, select) -> None:
    late, early = np.random.default_rng(0).random((2, 50))
    store = pool(None, None, {"late": late, "early": early})
    selection = select(store, build("c-rho", {"reference": "late", "proxy": "early", "keep": 12}))
    assert selection.rows().tolist() == best(late - early, 12)
    np.testing.assert_allclose(selection.steps[0].rows["score"], late - early, atol=1e-6)
    assert selection.steps[0].score == "reducible clip score"
    assert selection.steps[0].notes == (
        "reference: taken from the column late",
        "proxy: taken from the column early",
    )


@pytest.mark.parametrize("keyed", [True, False])
def test_the_pool_is_the_reference_and_another_pool_the_proxy_or_the_reverse(
    keyed, pool, pairs, select, tmp_path
) -> None:
    (image, text), (early_image, early_text) = pairs
    order = np.random.default_rng(1).permutation(120) if keyed else np.arange(120)
    names = np.array([f"k{i}" for i in range(120)])
    store = pool(image, text, {"uid": names} if keyed else None)
    write_pool(
        tmp_path / "early", early_image[order], early_text[order], {"uid": names[order]} if keyed else None, files=3
    )
    difference = cosines(image, text) - cosines(early_image, early_text)
    early = str(tmp_path / "early")
    selection = select(store, build("c-rho", {"proxy": early, "keep": 40}))
    np.testing.assert_allclose(selection.steps[0].rows["score"], difference, atol=1e-5)
    assert selection.rows().tolist() == best(difference, 40)
    assert selection.steps[0].notes[1] == f"proxy: {early}: computed from the image and text embeddings"
    reverse = select(store, build("c-rho", {"reference": early, "proxy": "clip-score", "keep": 40}))
    np.testing.assert_allclose(reverse.steps[0].rows["score"], -difference, atol=1e-5)

    some = select(store, build("random", {"keep": 33}))
    within = select(store, build("c-rho", {"proxy": early, "keep": 10}), within=some)
    np.testing.assert_allclose(within.steps[1].rows["score"], difference[some.rows()], atol=1e-5)


def test_a_column_and_a_file(pool, pairs, select, tmp_path) -> None:
    (image, text), (early_image, early_text) = pairs
    store = pool(image, text, {"uid": [f"k{i}" for i in range(120)]})
    early = cosines(early_image, early_text)
    pq.write_table(pa.table({"uid": [f"k{i}" for i in range(120)], "clip": early}), tmp_path / "early.parquet")
    selection = select(store, build("c-rho", {"proxy": str(tmp_path / "early.parquet"), "threshold": 0.1}))
    assert selection.rows().tolist() == np.flatnonzero(cosines(image, text) - early >= 0.1).tolist()


def test_another_pool_that_does_not_fit_is_told(pool, rows, pairs, select, tmp_path) -> None:
    (image, text), _ = pairs
    names = [f"k{i}" for i in range(120)]
    store = pool(image, text, {"uid": names})
    bare = pool(image, text, name="bare")
    write_pool(tmp_path / "short", rows(119), rows(119), {"uid": names[1:]})
    write_pool(tmp_path / "others", rows(120), rows(120), {"uid": [*names[:-2], "x", "y"]})
    write_pool(tmp_path / "keyless", rows(120), rows(120))
    write_pool(tmp_path / "twice", rows(120), rows(120), {"uid": [*names[:-1], "k0"]})
    wrong = rows(120)
    wrong[7] = np.nan
    write_pool(tmp_path / "nan", wrong, rows(120), {"uid": names})

    def proxy(name, on=store):
        select(on, build("c-rho", {"proxy": str(tmp_path / name), "keep": 10}))

    with pytest.raises(UsageError, match="short has 119 rows and .*pool 120; give a pool with the same rows"):
        proxy("short")
    with pytest.raises(UsageError, match=r"others has no row for the uid k118 \(2 of 120 rows are missing\)"):
        proxy("others")
    with pytest.raises(UsageError, match="pool has keys and .*keyless has none.*--key row"):
        proxy("keyless")
    with pytest.raises(UsageError, match="others has keys and .*bare has none"):
        proxy("others", bare)
    with pytest.raises(BadRowsError, match="twice: the uid 'k0' occurs more than once"):
        proxy("twice")
    with pytest.raises(BadRowsError, match="image_0.npy row 7"):
        proxy("nan")
    with pytest.raises(UsageError, match="proxy = '.*nowhere'"):
        proxy("nowhere")


def test_parameters() -> None:
    with pytest.raises(UsageError, match="c-rho needs proxy"):
        build("c-rho", {"keep": "10%"})
    with pytest.raises(UsageError, match="reference and proxy are both 'clip-score'"):
        build("c-rho", {"proxy": "clip-score", "keep": "10%"})


def test_infinite_scores_are_refused(pool, select) -> None:
    store = pool(None, None, {"late": [1.0, 2.0], "early": [0.0, float("inf")]})
    with pytest.raises(BadRowsError, match="proxy: early is infinite in row 1"):
        select(store, build("c-rho", {"reference": "late", "proxy": "early", "keep": 1}))
