from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.ops import crosscov
from thresher.ops.crosscov import (
    Taken,
    Walk,
    advance,
    drifts,
    forecast,
    losses,
    merge,
    where_clamped,
)
from thresher.ops.products import ON_CPU

CLAMPS = [0.0, None, 0.15, -0.1]


def pairs(n: int, dim: int = 12, seed: int = 0, alike: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Unit images and texts, (n, dim) float32: a common direction, a part both share, a part of their own."""
    rng = np.random.default_rng(seed)
    shared, common = rng.normal(size=(n, dim)), rng.normal(size=dim) * alike
    sides = [common + shared + rng.normal(size=(n, dim)) for _ in range(2)]
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in sides)


def clamped(products: np.ndarray, clamp: float | None) -> np.ndarray:
    return products if clamp is None else np.where(products < clamp, 0, products)


def dense(image: np.ndarray, text: np.ndarray, clamp: float | None) -> np.ndarray:
    """All s(i, j) in float64."""
    return clamped(image.astype(np.float64) @ text.T.astype(np.float64), clamp)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (7, 2050), (1025, 40), (1100, 1030)])
def test_similarity_sums(clamp, shape) -> None:
    image, text = pairs(shape[0])[0], pairs(shape[1], seed=1)[1]
    by_row, by_column = ON_CPU.sums(image, text, clamp)
    found = dense(image, text, clamp)
    np.testing.assert_allclose(by_row, found.sum(axis=1), atol=1e-3)
    np.testing.assert_allclose(by_column, found.sum(axis=0), atol=1e-3)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_losses_and_the_mean_loss_they_predict(clamp) -> None:
    image, text = pairs(60)
    taken = np.array([3, 17, 42])
    toward = np.stack([text[taken].mean(axis=0), image[taken].mean(axis=0)])
    expected = dense(image, text[taken], clamp).sum(axis=1) + dense(image[taken], text, clamp).sum(axis=0)
    plain = dense(image, text[taken], None).mean(axis=1) + dense(image[taken], text, None).mean(axis=0)
    loss, drift = losses(
        image, text, clamped_rows(image, text, clamp), Taken.of(image[taken], text[taken], toward), clamp
    )
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    np.testing.assert_allclose(drift, plain, atol=1e-6)
    np.testing.assert_allclose(drifts(image, text, toward), plain, atol=1e-6)


def clamped_rows(image: np.ndarray, text: np.ndarray, clamp: float | None) -> np.ndarray:
    """As the means of similarities tell it, in the same precision as those of a pool."""
    cross, mean = (np.add(*ON_CPU.sums(image, text, each)) / len(image) for each in (clamp, None))
    return where_clamped(cross, mean, clamp)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_rows_that_the_clamp_does_not_touch_are_known(clamp) -> None:
    image, text = pairs(80, alike=1.0, seed=4)
    changed = dense(image, text, clamp) != dense(image, text, None)
    touched = changed.any(axis=1) | changed.any(axis=0)
    found = clamped_rows(image, text, clamp)
    assert (found[touched]).all()
    assert (found == touched).all() or clamp == 0.15
    if clamp == 0.0:
        assert 0 < touched.sum() < 80


def greedy(image, text, gains, balance, clamp, refresh=1) -> tuple[list[int], list[float]]:
    """The walk through one class, from its definition, in float64."""
    n = len(gains)
    similar = dense(image, text, clamp)
    lose = similar + similar.T
    order: list[int] = []
    told: list[float] = []
    due: list[int] = []
    now = gains.copy()
    for _ in range(n):
        best = int(now.argmax())  # the lowest row among equals
        order.append(best)
        told.append(now[best])
        due.append(best)
        now[best] = -np.inf
        if len(order) % refresh == refresh - 1 or refresh == 1:
            now -= (lose[:, due].sum(axis=1) + balance[due].sum()) / n
            due = []
    return order, told


def walk_of(image, text, gains, balance, clamp) -> Walk:
    means = np.stack([text.mean(axis=0), image.mean(axis=0)]).astype(np.float32)
    return Walk(gains.copy(), drifts(image, text, means), means, clamped_rows(image, text, clamp), balance)


def go(walk, image, text, clamp, refresh, least, floor=-np.inf) -> None:
    def take(rows):
        return image[rows], text[rows]

    def spend(rows, toward):
        return losses(image, text, walk.clamped_n, Taken.of(image[rows], text[rows], toward), clamp)

    advance(walk, clamp, refresh, least, floor, take, spend)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("alike", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("n", "refresh"), [(1, 1), (2, 1), (40, 1), (700, 1), (90, 3), (500, 200), (450, 400)])
def test_the_walk_is_the_greedy_one(clamp, alike, n, refresh) -> None:
    image, text = pairs(n, seed=n, alike=alike)
    rng = np.random.default_rng(n)
    gains, balance = rng.normal(size=n), rng.uniform(-0.1, 0.5, n)
    walk = walk_of(image, text, gains, balance, clamp)
    go(walk, image, text, clamp, refresh, n)
    order, told = greedy(image, text, gains, balance, clamp, refresh)
    assert walk.order.tolist() == order
    np.testing.assert_allclose(walk.gains, told, atol=1e-5)


def test_few_candidates_are_enough(monkeypatch) -> None:
    """On 2,000 rows batches of fewer than all rows give the greedy order, and are long."""
    sizes = []
    whole = crosscov._certain

    def counted(walk, clamp, take):
        batch, toward = whole(walk, clamp, take)
        sizes.append((len(batch), toward is not None))
        return batch, toward

    monkeypatch.setattr(crosscov, "_certain", counted)
    image, text = pairs(2_000, dim=48, seed=3)
    own = 2 * np.einsum("ij,ij->i", image, text).astype(np.float64)
    balance = np.full(2_000, 0.3)
    for clamp in (0.0, None):
        sizes.clear()
        walk = walk_of(image, text, own, balance, clamp)
        go(walk, image, text, clamp, 1, 400)
        assert walk.order.tolist() == greedy(image, text, own, balance, clamp)[0][: len(walk.order)]
        assert all(bounded for _, bounded in sizes)
        assert np.mean([size for size, _ in sizes]) > 40


def regret(walk, image, text, gains, clamp) -> float:
    """By how much the best row was ever better than the one taken, in float64, along the walk's own order."""
    similar = dense(image, text, clamp)
    lose = (similar + similar.T) / len(gains)
    now, worst = gains.copy(), 0.0
    for row in walk.order:
        worst = max(worst, float(now.max() - now[row]))
        now -= lose[row]
        now[row] = -np.inf
    return worst


@pytest.mark.parametrize("clamp", [*CLAMPS, 0.4, 0.7, 1.0])
@pytest.mark.parametrize(
    "gap", [0.0, pytest.param(1e-4, marks=pytest.mark.slow), 0.003, pytest.param(0.02, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("against", [0.0, 0.3, -0.3])
def test_rows_left_out_of_sight_are_not_overlooked(clamp, gap, against) -> None:
    """The best rows resemble each other and spoil each other; those just behind are far off, or gain by it."""
    rng = np.random.default_rng(5)
    n, kind = 640, np.arange(640) // 160
    directions = np.eye(4, 12) + against * np.eye(4, 12)[::-1]
    image, text = (directions[kind] + 0.05 * rng.normal(size=(n, 12)) for _ in range(2))
    image, text = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))
    gains = 1 - gap * kind + 1e-5 * rng.random(n)
    walk = walk_of(image, text, gains, np.zeros(n), clamp)
    go(walk, image, text, clamp, 1, n)
    # Similarities that float32 puts on the other side of the clamp change a gain by clamp / n.
    assert regret(walk, image, text, gains, clamp) < 2e-6 + 2 * max(clamp or 0, 0) / n


@pytest.mark.parametrize("clamp", [0.0, None, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_no_row_is_taken_before_a_better_one(clamp, seed) -> None:
    """Also among copies, opposites and rows that the clamp silences."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(257, 900))
    image, text = pairs(n, dim=int(rng.integers(2, 24)), seed=seed, alike=rng.uniform(0, 2))
    image[: n // 5], text[: n // 5] = image[0], text[0]
    image[n // 5 : n // 3] = -image[0]
    text[n // 3 : n // 2] = image[n // 3 : n // 2]
    gains = rng.normal(size=n) * rng.choice([0.0, 1e-4, 1e-2, 1.0])
    walk = walk_of(image, text, gains, np.zeros(n), clamp)
    go(walk, image, text, clamp, 1, n)
    assert sorted(walk.order.tolist()) == list(range(n))
    assert regret(walk, image, text, gains, clamp) < 2e-6 + 2 * max(clamp or 0, 0) / n


def test_copies_are_taken_many_at_a_time(monkeypatch) -> None:
    batches = []
    whole = crosscov._certain
    monkeypatch.setattr(crosscov, "_certain", lambda *given: batches.append(1) or whole(*given))
    image, text = pairs(9_000, dim=16, seed=1)
    image[:3_000], text[:3_000] = image[0], image[0]
    gains = np.einsum("ij,ij->i", image, text).astype(np.float64)
    gains[:3_000] += 1
    walk = walk_of(image, text, gains, np.zeros(9_000), 0.0)
    go(walk, image, text, 0.0, 1, 1_500)
    assert (walk.order < 3_000).all()
    assert len(batches) < 20


@pytest.mark.parametrize("refresh", [1, 5])
def test_a_walk_taken_up_again_goes_the_same_way(refresh) -> None:
    image, text = pairs(400, seed=9)
    gains, balance = np.random.default_rng(9).normal(size=400), np.full(400, 0.2)
    at_once, again = (walk_of(image, text, gains, balance, 0.0) for _ in range(2))
    go(at_once, image, text, 0.0, refresh, 400)
    for least in (1, 60, 61, 200, 400):
        go(again, image, text, 0.0, refresh, least)
        assert len(again.order) >= least
    for name in ("order", "gains", "lost"):
        assert getattr(again, name).tobytes() == getattr(at_once, name).tobytes()


def test_a_walk_ends_at_the_floor_but_moves() -> None:
    image, text = pairs(400, seed=9)
    gains, balance = np.random.default_rng(9).normal(size=400), np.zeros(400)
    walk = walk_of(image, text, gains, balance, 0.0)
    go(walk, image, text, 0.0, 1, 400, floor=1.0)
    assert walk.gains[-1] <= 1.0
    assert len(walk.order) < 200
    before = len(walk.order)
    go(walk, image, text, 0.0, 1, 400, floor=1.0)
    assert before < len(walk.order) <= before + 64


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=8), min_size=1, max_size=6),
    st.integers(0, 50),
    st.randoms(use_true_random=False),
)
def test_merge_is_taking_the_best_next_row(values, budget, random) -> None:
    """Also where gains grow inside a class, and with ties everywhere."""
    ids = list(range(sum(map(len, values))))
    random.shuffle(ids)
    rows = [np.array([ids.pop() for _ in own], np.int64) for own in values]
    if not any(values):
        return
    budget = max(budget, 1)
    at = [0] * len(values)
    worst = []
    for _ in range(min(budget, sum(map(len, values)))):
        heads = [
            (-own[i], int(row[i]), k)
            for k, (own, row, i) in enumerate(zip(values, rows, at, strict=True))
            if i < len(own)
        ]
        gain, _, k = min(heads)
        at[k] += 1
        worst.append(-gain)
    counts, cut = merge([np.array(own, np.float64) for own in values], rows, budget)
    assert counts.tolist() == at
    assert cut == (min(worst) if len(worst) == budget else -np.inf)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_forecast_spends_the_budget_within_the_classes(sizes, data) -> None:
    n = sum(sizes)
    if not n:
        return
    budget = data.draw(st.integers(1, n))
    rng = np.random.default_rng(n)
    starts = np.cumsum(sizes) - sizes
    found = forecast(rng.normal(size=n), rng.random(n), rng.random(n), starts, budget)
    assert found.sum() == budget
    assert (found <= sizes).all()
