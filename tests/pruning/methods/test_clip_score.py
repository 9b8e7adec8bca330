from __future__ import annotations

import numpy as np
import pytest

from thresher import BadRowsError, UsageError, build


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_best_agreeing_pairs_stay(pool, rows, select, seed, dtype) -> None:
    scale = np.random.default_rng(seed).uniform(0.1, 20, (211, 1))  # stored embeddings need not be units
    image, text = (rows(211, seed=seed) * scale).astype(dtype), rows(211, seed=seed + 50).astype(dtype)
    scores = [cosine(a, b) for a, b in zip(image, text, strict=True)]
    best = sorted(range(211), key=lambda i: (-scores[i], i))
    store = pool(image, text)
    selection = select(store, build("clip-score", {"keep": 60}))
    assert selection.rows().tolist() == sorted(best[:60])
    np.testing.assert_allclose(selection.steps[0].rows["score"], scores, atol=1e-6)
    assert selection.steps[0].cut == pytest.approx(scores[best[59]], abs=1e-6)
    threshold = (scores[best[80]] + scores[best[81]]) / 2
    assert select(store, build("clip-score", {"threshold": threshold})).rows().tolist() == sorted(best[:81])


def test_a_threshold_keeps_what_equals_it_and_ties_at_a_budget_go_to_the_lower_row(pool, select) -> None:
    store = pool(np.ones((6, 2)), None, {"similarity": [0.28, 0.5, 0.27999, 0.28, 0.28, -1.0]})
    assert select(store, build("clip-score", {"threshold": 0.28})).rows().tolist() == [0, 1, 3, 4]
    selection = select(store, build("clip-score", {"keep": 3}))
    assert selection.rows().tolist() == [0, 1, 3]
    assert selection.steps[0].why(2) == "clip score 0.2800 is below the cut at 0.2800"
    assert selection.steps[0].notes == ("taken from the column similarity",)


def test_embeddings_win_over_a_stored_score_unless_named(pool, rows, select) -> None:
    image = rows(20)
    store = pool(image, image[::-1].copy(), {"similarity": np.linspace(0, 1, 20), "mine": np.linspace(1, 0, 20)})
    auto = select(store, build("clip-score", {"keep": 5}))
    assert auto.steps[0].notes == ("computed from the image and text embeddings",)
    computed = select(store, build("clip-score", {"keep": 5, "column": "embeddings"}))
    assert auto.rows().tolist() == computed.rows().tolist()
    assert select(store, build("clip-score", {"keep": 5, "column": "mine"})).rows().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("given", [{}, {"keep": "30%", "threshold": 0.2}])
def test_exactly_one_of_keep_and_threshold(given) -> None:
    with pytest.raises(UsageError, match="either keep .* or threshold"):
        build("clip-score", given)


def test_scores_that_are_not_there_are_told(pool, rows, select) -> None:
    half = build("clip-score", {"keep": "50%"})
    with pytest.raises(UsageError, match="neither both embeddings nor a known score column"):
        select(pool(rows(4), name="none"), half)
    with pytest.raises(UsageError, match="4 dimensions, text embeddings 8"):
        select(pool(rows(4, dim=4), rows(4), name="widths"), half)
    with pytest.raises(UsageError, match="'worth'"):
        select(pool(rows(4), name="column"), build("clip-score", {"keep": "50%", "column": "worth"}))
    with pytest.raises(BadRowsError, match=r"part_0.parquet row 1: .*'similarity' is empty or NaN \(2 such rows\)"):
        select(pool(rows(4), None, {"similarity": [0.1, None, 0.3, float("nan")]}, name="nulls"), half)
