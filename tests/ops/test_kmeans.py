from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.ops.kmeans import (
    SLACK,
    STRIPE,
    TILE,
    Assign,
    AssignTree,
    Bounds,
    MoveRows,
    Moves,
    Passes,
    State,
    add_by_group,
    fit,
    nearest_centroid,
    nearest_two,
    sums_by_group,
)


def units(n: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def passes(rows: np.ndarray, block: int = 4 * STRIPE) -> Passes:
    def each(rule: MoveRows, state: State) -> Iterator[Moves]:
        for lo in range(0, len(rows), block):
            hi = min(lo + block, len(rows))
            yield rule((rows[a : min(a + STRIPE, hi)] for a in range(lo, hi, STRIPE)), state.bounds(lo, hi))

    return each


def run(rows: np.ndarray, start: np.ndarray, iterations: int, **how: Any) -> np.ndarray:
    return fit(passes(rows), rows.__getitem__, State.start(start, len(rows)), iterations, **how)


def lloyd(rows: np.ndarray, start: np.ndarray, iterations: int) -> np.ndarray:
    """Plain Lloyd in float64, every row against every centroid; for starts that leave no group empty."""
    centroids = start.astype(np.float64)
    for _ in range(iterations):
        labels = (rows.astype(np.float64) @ centroids.T).argmax(axis=1)
        sums = np.stack([rows[labels == j].astype(np.float64).sum(axis=0) for j in range(len(centroids))])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centroids


def cosine_of_best(rows: np.ndarray, centroids: np.ndarray) -> float:
    return float((rows.astype(np.float64) @ centroids.T.astype(np.float64)).max(axis=1).mean())


@pytest.mark.parametrize("n", [0, 1, STRIPE - 1, STRIPE + 1, 2 * STRIPE + 5])
@pytest.mark.parametrize("k", [1, 7, TILE, TILE + 1, 2 * TILE + 3])
def test_the_nearest_is_the_argmax_of_the_whole_product(n: int, k: int) -> None:
    rows, centroids = units(n, 4, 1) * 3, units(k, 4, 2)
    labels, products = nearest_centroid(rows, centroids)
    full = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    assert (labels.dtype, products.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(full[np.arange(n), labels], full.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(products, full.max(axis=1), atol=1e-6)


def test_ties_go_to_the_lower_centroid_within_a_tile_and_across() -> None:
    """Small whole numbers, so that products are exact."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (STRIPE + 9, 4)).astype(np.float32)
    centroids = rng.integers(-1, 2, (TILE + 40, 4)).astype(np.float32)
    labels, _ = nearest_centroid(rows, centroids)
    for row, label in list(zip(rows, labels, strict=True))[::50]:
        products = [float(sum(a * b for a, b in zip(row, c, strict=True))) for c in centroids]
        assert label == products.index(max(products))


@pytest.mark.parametrize("k", [1, 2, 9, TILE + 3])
def test_the_second_nearest_is_found_too(k: int) -> None:
    rows, centroids = units(STRIPE + 7, 4, 1), units(k, 4, 2)
    labels, best, second = nearest_two(rows, centroids)
    full = np.sort(rows.astype(np.float64) @ centroids.T.astype(np.float64), axis=1)
    np.testing.assert_allclose(best, full[:, -1], atol=1e-6)
    np.testing.assert_allclose(second, full[:, -2] if k > 1 else -np.inf, atol=1e-6)


@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 5), st.integers(0, 1000))
def test_the_first_moves_are_the_sums_of_each_group(stripes: int, size: int, k: int, seed: int) -> None:
    rows, centroids = units(stripes * size, 3, seed), units(k, 3, seed + 1)
    n = len(rows)
    bounds = Bounds(np.full(n, -1, np.int32), np.zeros(n, np.float32), np.zeros(n, np.float32))
    moves = MoveRows(centroids, np.zeros(k, np.float32))((rows[lo : lo + size] for lo in range(0, n, size)), bounds)
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    for row, label in zip(rows.astype(np.float64), moves.bounds.labels_B, strict=True):
        sums[int(label)] = sums.get(int(label), 0) + row
        counts[int(label)] = counts.get(int(label), 0) + 1
    assert moves.groups_J.tolist() == sorted(sums)
    np.testing.assert_allclose(moves.sums_JD, [sums[j] for j in sorted(sums)], atol=1e-5)
    assert moves.counts_J.tolist() == [counts[j] for j in sorted(sums)]
    angles = np.sort(np.arccos(np.clip(rows.astype(np.float64) @ centroids.T.astype(np.float64), -1, 1)), axis=1)
    np.testing.assert_allclose(moves.bounds.upper_B, angles[:, 0], atol=2e-3)
    if k > 1:
        np.testing.assert_allclose(moves.bounds.lower_B, angles[:, 1], atol=2e-3)


@pytest.mark.parametrize("sizes", [[12_000], [5000, 7000], [100] * 120, [4096, 1, 4095, 3808]])
def test_moves_of_many_rows_are_the_changes_of_each_group(sizes: list[int]) -> None:
    """Rows that change their group are summed some thousand at a time, whatever the stripes are."""
    rows, old, new = units(12_000, 3, 1), units(9, 3, 2), units(9, 3, 3)
    ends = np.cumsum(sizes).tolist()
    label = nearest_centroid(rows, old)[0]
    for before in (np.full(len(rows), -1, np.int32), label):
        bounds = Bounds(before.copy(), np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32))
        stripes = (rows[end - size : end] for size, end in zip(sizes, ends, strict=True))
        rule = MoveRows(new, np.full(9, 4, np.float32), bounds="sampled")
        moves = rule(stripes, bounds)
        after = nearest_centroid(rows, new)[0]
        assert ((after != before).sum()) > 4096
        sums, counts = np.zeros((9, 3)), np.zeros(9, np.int64)
        for row, left, joined in zip(rows.astype(np.float64), before.tolist(), after.tolist(), strict=True):
            for group, sign in ((left, -1), (joined, 1)):
                if left != joined and group >= 0:
                    sums[group] += sign * row
                    counts[group] += sign
        assert moves.groups_J.tolist() == list(range(9))
        np.testing.assert_allclose(moves.sums_JD, sums, atol=1e-3)
        np.testing.assert_array_equal(moves.counts_J, counts)
        np.testing.assert_array_equal(moves.bounds.labels_B, after)


class Counting:
    """Notes how many rows are multiplied with how many centroids."""

    stripe = STRIPE

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def prepared(self, centroids: np.ndarray) -> np.ndarray:
        return centroids

    def __call__(
        self, some: np.ndarray, centroids: np.ndarray, scratch: np.ndarray | None = None, *, second: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.seen.append((len(some), len(centroids)))
        return nearest_two(some, centroids, scratch, second=second)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "dim", "k"), [(600, 5, 7), (3000, 16, 12), (2500, 3, 4)])
def test_it_is_plain_lloyd(n: int, dim: int, k: int, seed: int) -> None:
    rows, start = units(n, dim, seed), units(k, dim, seed + 100)
    for iterations in (1, 2, 5, 15):
        np.testing.assert_allclose(run(rows, start, iterations), lloyd(rows, start, iterations), atol=2e-5)


def test_rows_that_cannot_change_their_group_are_not_multiplied() -> None:
    centres = units(12, 32, 0)
    noise = 0.08 * np.random.default_rng(1).normal(size=(6000, 32))
    rows = centres[np.arange(6000) % 12] + noise.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    counting = Counting()
    start = rows[[*range(11), 0]] + 0.02 * units(12, 32, 5)
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    found = run(rows, start, 30, nearest=counting)
    np.testing.assert_allclose(found, run(rows, start, 30, slack=10.0), atol=1e-5)  # 10 radians: skip nothing
    assert sum(rows for rows, _ in counting.seen) < 0.5 * 30 * len(rows)


def flat(n: int, dim: int, seed: int) -> np.ndarray:
    """Unit rows without cluster structure: Gaussian, with a spectrum that falls as in embeddings."""
    rows = np.random.default_rng(seed).normal(size=(n, dim)) / np.sqrt(np.arange(1, dim + 1))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("slack", [SLACK, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_of_bounds_changes_no_label(seed: int, slack: float) -> None:
    """All rules are used: no bounds, bounds that are only taken, and bounds without and with fast centroids."""
    rows = flat(6000, 24, seed) if seed else np.concatenate([flat(5000, 24, 5), planted(1000, 24)])
    used: list[tuple[str, bool]] = []

    def each(rule: MoveRows, state: State) -> Iterator[Moves]:
        assert isinstance(rule, MoveRows)
        used.append((rule.bounds, len(rule.fast_F) > 0))
        yield from passes(rows)(rule, state)

    state = State.start(rows[:64], len(rows))
    labels: list[np.ndarray] = []
    fit(each, rows.__getitem__, state, 40, slack=slack, after=lambda state: labels.append(state.labels_N.copy()))
    assert {("sampled", False), ("taken", False)} <= set(used)
    assert any(bounds == "used" and fast for bounds, fast in used)
    centroids = rows[:64].astype(np.float64)
    for label in labels:
        np.testing.assert_array_equal(label, (rows.astype(np.float64) @ centroids.T).argmax(axis=1))
        sums = np.stack([rows[label == j].astype(np.float64).sum(axis=0) for j in range(64)])
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)


def planted(n: int, dim: int) -> np.ndarray:
    centres = units(8, dim, 0)
    rows = centres[np.arange(n) % 8] + 0.1 * np.random.default_rng(1).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("fast", [[], [0], [3, 7, 11], list(range(20))])
def test_bounds_hold_for_any_choice_of_fast_centroids(fast: list[int]) -> None:
    rng = np.random.default_rng(len(fast))
    rows, old, n = flat(2 * STRIPE + 100, 12, 1), flat(20, 12, 2), 2 * STRIPE + 100
    new = old + rng.normal(size=old.shape) * np.where(np.isin(np.arange(20), fast), 0.2, 0.01)[:, None]
    new = (new / np.linalg.norm(new, axis=1, keepdims=True)).astype(np.float32)
    moved = np.arccos(np.clip((old.astype(np.float64) * new).sum(axis=1), -1, 1)).astype(np.float32)
    angles = np.sort(np.arccos(rows.astype(np.float64) @ old.T), axis=1)
    labels, _ = nearest_centroid(rows, old)
    bounds = Bounds(labels, angles[:, 0].astype(np.float32), angles[:, 1].astype(np.float32))
    counting = Counting()
    rule = MoveRows(new, moved, counting, fast_F=np.array(fast, np.int64))
    result = rule((rows[lo : lo + STRIPE] for lo in range(0, n, STRIPE)), bounds).bounds
    after = np.arccos(rows.astype(np.float64) @ new.T)
    np.testing.assert_array_equal(result.labels_B, after.argmin(axis=1))
    own = after[np.arange(n), result.labels_B]
    after[np.arange(n), result.labels_B] = np.inf
    assert (own <= result.upper_B + 2e-3).all()
    assert (after.min(axis=1) >= result.lower_B - 2e-3).all()
    if len(fast) == 3:
        assert (
            sum(rows for rows, centroids in counting.seen if centroids == 20) < 0.7 * n
        )  # without, the moves of the three would make all rows doubtful


@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 1000))
def test_sums_by_group_are_taken_in_row_order(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, at = rng.normal(size=(n, 3)).astype(np.float32), np.flatnonzero(rng.random(n) < 0.7)
    labels = rng.integers(0, k, len(at)).astype(np.int32)
    if not len(at):
        return
    found = sums_by_group(rows, labels, at)
    assert sorted(found.groups_J) == sorted(set(labels.tolist()))
    for group, total, count in zip(found.groups_J, found.sums_JD, found.counts_J, strict=True):
        expected = np.zeros(3, np.float32)
        for i, row in enumerate(rows[at[labels == group]]):
            expected = row.copy() if i == 0 else expected + row
        assert (total.tobytes(), count) == (expected.tobytes(), (labels == group).sum())


def test_bounds_hold_after_every_iteration() -> None:
    rows = units(2000, 8, 3)

    def check(state: State) -> None:
        before = history[-1]  # bounds were taken against the centroids before the update
        angles = np.arccos(np.clip(rows.astype(np.float64) @ before.T.astype(np.float64), -1, 1))
        own = angles[np.arange(len(rows)), state.labels_N]
        angles[np.arange(len(rows)), state.labels_N] = np.inf
        assert (own <= state.upper_N + 2e-3).all()
        assert (angles.min(axis=1) >= state.lower_N - 2e-3).all()
        history.append(state.centroids_KD.copy())

    history = [rows[:15].copy()]
    run(rows, rows[:15], 12, after=check)
    assert len(history) == 13


@pytest.mark.parametrize("seed", range(3))
def test_the_objective_never_falls(seed: int) -> None:
    rows = units(2500, 6, seed)
    seen = [cosine_of_best(rows, rows[:20])]
    run(rows, rows[:20], 12, after=lambda state: seen.append(cosine_of_best(rows, state.centroids_KD)))
    assert len(seen) == 13
    assert (np.diff(seen) >= -1e-7).all()
    assert seen[-1] > seen[0] + 0.01


def test_planted_clusters_are_found() -> None:
    centres = np.eye(6, dtype=np.float32)
    truth = np.arange(900) % 6
    noise = 0.05 * np.random.default_rng(0).normal(size=(900, 6))
    rows = ((centres[truth] + noise) / np.linalg.norm(centres[truth] + noise, axis=1)[:, None]).astype(np.float32)
    found = run(rows, rows[:6], 5)
    labels, distances = Assign(found)(rows[lo : lo + STRIPE] for lo in range(0, 900, STRIPE))
    assert labels.tolist() == truth.tolist()  # rows 0..5 start one cluster each
    assert (centres * found).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(distances, 1 - (rows * found[truth]).sum(axis=1), atol=1e-6)


def test_empty_clusters_take_over_the_rows_farthest_from_their_centroids() -> None:
    rows = np.concatenate([np.tile(np.eye(4, dtype=np.float32)[0], (50, 1)), np.eye(4, dtype=np.float32)[1:3]])
    start = np.tile(np.eye(4, dtype=np.float32)[0], (3, 1))  # two of three start empty
    found = run(rows, start, 1)
    assert found[1:].tolist() == rows[50:].tolist()
    found = run(rows, start, 3)
    assert cosine_of_best(rows, found) == pytest.approx(1)
    assert np.bincount(Assign(found)([rows])[0], minlength=3).tolist() == [50, 1, 1]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 1), (40, 40), (3, 5)])
def test_few_rows_and_identical_rows(n: int, k: int) -> None:
    rows = units(n, 4, 0)
    found = run(rows, rows[np.arange(k) % n], 4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert k == 1 or cosine_of_best(rows, found) == pytest.approx(1, abs=1e-6)
    same = np.tile(rows[:1], (n, 1))
    np.testing.assert_allclose(run(same, same[np.arange(k) % n], 4), np.tile(rows[:1], (k, 1)), atol=1e-6)


def test_a_group_whose_rows_cancel_stays_where_it_was() -> None:
    rows = np.array([[1, 0], [-1, 0]], np.float32)
    start = np.array([[0, 1]], np.float32)
    assert run(rows, start, 3).tolist() == start.tolist()


def test_no_iterations_return_the_start() -> None:
    rows = units(10, 3, 0)
    assert run(rows, rows[:2], 0).tolist() == rows[:2].tolist()


def test_a_fixed_point_is_the_end() -> None:
    rows = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    states: list[int] = []
    run(rows, np.eye(3, dtype=np.float32), 1000, after=lambda state: states.append(int(state.done)))
    assert states == [1, 1000]


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_resuming_after_any_iteration_gives_the_same_bits(stop: int) -> None:
    rows, saved = units(3000, 6, 0), {}

    def save(state: State) -> None:
        saved[int(state.done)] = {name: array.copy() for name, array in state.arrays().items()}

    whole = run(rows, rows[:30], 6, after=save)
    assert sorted(saved) == [1, 2, 3, 4, 5, 6]
    again = fit(passes(rows), rows.__getitem__, State(**saved[stop]), 6)
    assert again.tobytes() == whole.tobytes()


def test_blocks_of_whole_stripes_agree_to_rounding() -> None:
    """Promised bit for bit: the same stripes and blocks. Another cut may only move the last digits."""
    rows = units(5 * STRIPE + 77, 6, 3)

    def cut(block: int) -> np.ndarray:
        return fit(passes(rows, block), rows.__getitem__, State.start(rows[:10], len(rows)), 5)

    assert cut(STRIPE).tobytes() == cut(STRIPE).tobytes()
    np.testing.assert_allclose(cut(STRIPE), cut(3 * STRIPE), atol=1e-6)


@pytest.mark.parametrize("counts", [[1], [3, 1, 5], [4, 9, 1, 1], [2, 3, 1, 7, 30, 2, 1, 8, 5]])
def test_a_tree_finds_the_nearest_centroid_of_the_four_nearest_coarse_ones(counts: list[int]) -> None:
    """Of up to four coarse ones, that is the nearest of all."""
    rows, coarse, centroids = units(2_500, 6, 0), units(len(counts), 6, 1), units(sum(counts), 6, 2)
    owner = np.repeat(np.arange(len(counts)), counts)
    near = np.argsort(-(rows.astype(np.float64) @ coarse.T.astype(np.float64)), axis=1)[:, :4]
    cosines = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    cosines[~(owner[None, :, None] == near[:, None, :]).any(axis=2)] = -np.inf
    buffer = np.empty((STRIPE, 6), np.float32)

    def stripes() -> Iterator[np.ndarray]:  # each is valid until the next one, as those of a store
        for lo in range(0, len(rows), STRIPE):
            part = buffer[: len(rows[lo : lo + STRIPE])]
            part[:] = rows[lo : lo + STRIPE]
            yield part

    labels, distances = AssignTree(coarse, centroids, np.cumsum(counts))(stripes())
    assert labels.dtype == np.int32
    assert labels.tolist() == cosines.argmax(axis=1).tolist()
    np.testing.assert_allclose(distances, 1 - cosines.max(axis=1), atol=1e-6)
    if len(counts) <= 4:
        assert labels.tolist() == nearest_centroid(rows, centroids)[0].tolist()


def test_a_tree_with_equal_centroids_takes_the_lower_one() -> None:
    rows, coarse = units(50, 4, 0), units(3, 4, 1)
    centroids = np.tile(np.eye(4, dtype=np.float32)[0], (5, 1))  # whose products are exact
    assert AssignTree(coarse, centroids, np.array([2, 3, 5]))([rows])[0].tolist() == [0] * 50


@pytest.mark.parametrize("groups", [3, 40])
def test_changes_of_blocks_can_be_added_up_before_they_are_applied(groups: int) -> None:
    """As a tree on other machines: bounds come block by block, the changes of all blocks once."""
    rows = units(3_000, 5, 0)
    start = rows[:groups]

    def each(rule: MoveRows, state: State) -> Iterator[Moves]:
        total = None
        for lo in range(0, len(rows), 500):
            bounds, changes = rule([rows[lo : lo + 500]], state.bounds(lo, lo + 500)).apart()
            assert len(bounds.groups_J) == 0
            assert len(changes.bounds.labels_B) == 0
            yield bounds
            total = changes if total is None else total.plus(changes)
        assert total is not None
        assert (np.diff(total.groups_J) > 0).all()
        yield total

    found = fit(each, rows.__getitem__, State.start(start, len(rows)), 12)
    np.testing.assert_allclose(found, lloyd(rows, start, 12), atol=1e-5)


def test_sums_of_other_groups_are_added() -> None:
    one = (np.array([1, 4]), np.array([[1.0], [2.0]]), np.array([1, 2]))
    other = (np.array([0, 4, 9]), np.array([[5.0], [6.0], [7.0]]), np.array([3, 4, 5]))
    groups, sums, counts = add_by_group(one, other)
    assert (groups.tolist(), counts.tolist()) == ([0, 1, 4, 9], [3, 1, 6, 5])
    assert sums.tolist() == [[5.0], [1.0], [8.0], [7.0]]
    groups, sums, counts = add_by_group((groups, sums, counts), one)
    assert (groups.tolist(), counts.tolist()) == ([0, 1, 4, 9], [3, 2, 8, 5])
    nothing = (groups[:0], sums[:0], counts[:0])
    assert add_by_group(nothing, one)[1].tolist() == [[1.0], [2.0]]
    assert add_by_group(one, nothing)[2].tolist() == [1, 2]
