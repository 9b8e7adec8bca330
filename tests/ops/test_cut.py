from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thresher.errors import BudgetError, UsageError
from thresher.ops import cut
from thresher.ops.cut import allocate, by_group, order_by_group, pack, softmax, top, top_per_group

# Few distinct values, so that ties abound; both zeros, both infinities, the smallest and largest of float32.
SOME = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, float("inf"), float("-inf"), 1e-45, -1e-45, 3.4e38, -3.4e38]
floats = st.one_of(st.sampled_from(SOME), st.floats(width=32, allow_nan=False))
sizes = st.integers(0, 40)
score_arrays = sizes.flatmap(
    lambda n: st.one_of(
        hnp.arrays(np.float32, n, elements=st.sampled_from([np.float32(x) for x in SOME])),
        hnp.arrays(np.float32, n, elements=st.floats(width=32, allow_nan=False)),
        hnp.arrays(np.uint32, n, elements=st.sampled_from([0, 1, 2, 2**31, 2**32 - 1])),
        hnp.arrays(np.uint64, n, elements=st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**53 + 1, 2**64 - 1])),
    )
)


def best_first(scores: np.ndarray, rows: list[int]) -> list[int]:
    return sorted(rows, key=lambda i: (-scores[i].item(), i))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = draw(score_arrays)
    k = draw(st.integers(1, 6))
    labels = draw(hnp.arrays(np.int32, len(scores), elements=st.integers(0, k - 1)))
    counts = [draw(st.integers(0, int((labels == j).sum()))) for j in range(k)]
    return scores, labels, np.array(counts, np.int64)


@given(score_arrays, st.data())
def test_top_is_the_head_of_a_sort(scores: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    assert np.flatnonzero(top(scores, k)).tolist() == sorted(best_first(scores, list(range(len(scores))))[:k])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64])
def test_top_takes_any_number(dtype: type) -> None:
    assert top(np.array([1, 3, 3, 2, 3], dtype), 2).tolist() == [False, True, True, False, False]


@given(grouped())
def test_top_per_group_is_the_head_of_each_group(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, counts = case
    expected = []
    for j, count in enumerate(counts):
        expected += best_first(scores, [i for i in range(len(scores)) if labels[i] == j])[:count]
    mask = top_per_group(scores, labels, counts)
    assert np.flatnonzero(mask).tolist() == sorted(expected)
    assert mask.sum() == counts.sum()


@given(grouped())
def test_order_by_group_is_a_stable_sort(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, _ = case
    expected = sorted(range(len(scores)), key=lambda i: (labels[i], -scores[i].item(), i))
    assert np.concatenate(list(order_by_group(scores, labels))).tolist() == expected


@pytest.mark.parametrize("kind", ["float32", "uint32", "uint64"])
@pytest.mark.parametrize("groups", [1, 3, 5_000])
def test_many_rows_in_blocks(groups: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, digits and parts smaller than the groups; many ties, so that row ids decide."""
    monkeypatch.setattr(cut, "_BLOCK", 1_000)
    monkeypatch.setattr(cut, "_SORTED", 300)
    rng, n = np.random.default_rng(groups), 20_000
    labels = np.minimum(rng.geometric(0.2, n) * groups // 12, groups - 1)
    some = (
        rng.standard_normal(60) if kind == "float32" else rng.integers(0, np.iinfo(kind).max, 60, kind, endpoint=True)
    )
    scores = np.concatenate([rng.choice(some, n // 2), rng.permutation(n - n // 2)]).astype(kind)
    labels[:4_000], scores[:4_000] = labels[0], scores[0]  # one group of equal scores
    expected = np.lexsort((np.arange(n), -scores if kind == "float32" else ~scores, labels))
    spaces = []

    def space(count: int) -> np.ndarray:
        spaces.append(count)
        return np.empty(count, np.int64)

    assert by_group(labels, space).tolist() == np.argsort(labels, kind="stable").tolist()
    assert spaces == [n]
    spaces.clear()
    parts = list(order_by_group(scores, labels, space))
    assert np.concatenate(parts).tolist() == expected.tolist()
    assert spaces[0] == n
    assert len(parts) > 20
    sizes = np.bincount(labels, minlength=groups)
    for share in (0, 0.3, 1):
        counts = (sizes * share).astype(np.int64)
        mask = np.zeros(n, bool)
        starts = np.cumsum(sizes) - sizes
        for start, count in zip(starts, counts, strict=True):
            mask[expected[start : start + count]] = True
        assert top_per_group(scores, labels, counts).tolist() == mask.tolist()


def test_counts_and_sums_of_groups_are_those_of_bincount(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, although rows are added in blocks."""
    rng = np.random.default_rng(0)
    labels, values, mask = rng.integers(0, 7, 5_000), rng.random(5_000, np.float32), rng.random(5_000) < 0.4
    for block in (64, 4_999, 10_000):
        monkeypatch.setattr(cut, "_BLOCK", block)
        assert cut.sums_of(labels, values, 9).tobytes() == np.bincount(labels, values, 9).tobytes()
        assert cut.sizes_of(labels, 9).tolist() == np.bincount(labels, minlength=9).tolist()
        assert cut.sizes_of(labels, 0, mask).tolist() == np.bincount(labels[mask]).tolist()


def test_no_rows() -> None:
    assert top_per_group(np.empty(0, np.float32), np.empty(0, np.int32), np.zeros(0, np.int64)).tolist() == []
    assert [len(part) for part in order_by_group(np.empty(0, np.float32), np.empty(0, np.int32))] == [0]
    assert by_group(np.empty(0, np.int32)).tolist() == []


@pytest.mark.parametrize("kind", ["float32", "uint64"])
def test_memory_a_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of budgets and top-k at most 12 bytes a row, of a quota half a byte and the result."""
    monkeypatch.setattr(cut, "_BLOCK", 2**14)
    monkeypatch.setattr(cut, "_SORTED", 2**16)
    n = 500_000
    scores = np.random.default_rng(0).integers(0, 1_000, n).astype(kind)  # many ties
    labels, counts = np.zeros(n, np.int32), np.array([n // 3])
    spaces = [np.empty(n, np.int64) for _ in range(9)]
    used = {}
    for name, call in (
        ("top", lambda: top(scores, n // 3)),
        ("top_per_group", lambda: top_per_group(scores, labels, counts)),
        (
            "order_by_group",
            lambda: [None for _ in order_by_group(scores, labels, lambda count: spaces.pop()[:count])],
        ),
    ):
        tracemalloc.start()
        call()
        used[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert used["top"] < 12 * n
    assert used["top_per_group"] < 1.6 * n + 80 * cut._BLOCK + 2**20
    assert used["order_by_group"] < 100 * cut._SORTED + n / 2


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (BudgetError, "4 of 3", lambda: top(np.zeros(3), 4)),
        (BudgetError, "-1 of 3", lambda: top(np.zeros(3), -1)),
        (UsageError, "row 1 is NaN", lambda: top(np.array([0, np.nan]), 1)),
        (UsageError, "row 0 is NaN", lambda: order_by_group(np.array([np.nan], np.float32), np.array([0]))),
        (UsageError, "row 0 is NaN", lambda: top_per_group(np.array([np.nan], np.float32), np.array([0]), np.ones(1))),
        (UsageError, "float64", lambda: order_by_group(np.zeros(1), np.array([0]))),
        (
            BudgetError,
            "2 rows of group 1, which has 1",
            lambda: top_per_group(np.zeros(1, np.float32), np.array([1]), np.array([0, 2])),
        ),
        (BudgetError, "-1 rows", lambda: top_per_group(np.zeros(1, np.float32), np.array([0]), np.array([-1]))),
        (
            UsageError,
            "label 3 is out",
            lambda: top_per_group(np.zeros(1, np.float32), np.array([3]), np.array([0])),
        ),
        (UsageError, "finite", lambda: allocate(np.array([np.nan]), np.array([0]), np.array([5]), 3)),
        (UsageError, "finite", lambda: allocate(np.array([np.inf]), np.array([0]), np.array([5]), 3)),
        (BudgetError, "than the group has", lambda: allocate(np.zeros(1), np.array([6]), np.array([5]), 3)),
        (
            BudgetError,
            "6 rows: the .* 0 to 5",
            lambda: allocate(np.zeros(1), np.array([0]), np.array([5]), 6),
        ),
        (
            BudgetError,
            "1 rows: the .* 2 to 5",
            lambda: allocate(np.zeros(1), np.array([2]), np.array([5]), 1),
        ),
    ],
)
def test_what_cannot_be_done_is_refused(error: type[Exception], text: str, call: object) -> None:
    with pytest.raises(error, match=text):
        call()  # type: ignore[operator]


@st.composite
def allocations(draw: st.DrawFn, most_groups: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    k = draw(st.integers(1, most_groups))
    target = np.array([draw(st.one_of(st.integers(-2, most), st.floats(-most, 2 * most))) for _ in range(k)], float)
    high = np.array([draw(st.integers(0, most)) for _ in range(k)])
    low = np.array([draw(st.integers(0, h)) for h in high])
    return target, low, high, draw(st.integers(int(low.sum()), int(high.sum())))


@given(allocations(4, 5))
def test_allocate_finds_the_best_whole_numbers(case: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> None:
    target, low, high, total = case
    found = allocate(target, low, high, total)
    ranges = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
    best = min(((np.array(x) - target) ** 2).sum() for x in product(*ranges) if sum(x) == total)
    assert found.sum() == total
    assert (low <= found).all()
    assert (found <= high).all()
    assert ((found - target) ** 2).sum() == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(allocations(30, 1000))
def test_allocate_stays_within_a_row_of_the_quadratic_programme(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int],
) -> None:
    target, low, high, total = case
    left, right = float((low - target).min()), float((high - target).max())
    for _ in range(200):  # bisection on the one multiplier of the programme
        middle = (left + right) / 2
        left, right = (middle, right) if np.clip(target + middle, low, high).sum() < total else (left, middle)
    found = allocate(target, low, high, total)
    assert found.sum() == total
    assert (np.abs(found - np.clip(target + right, low, high)) < 1 + 1e-6).all()
    assert ((low <= found) & (found <= high)).all()


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # osqp's own
@pytest.mark.parametrize("seed", range(5))
def test_allocate_agrees_with_a_solver(seed: int) -> None:
    from qpsolvers import solve_qp
    from scipy.sparse import csc_matrix, identity

    rng = np.random.default_rng(seed)
    high = rng.integers(1, 60, 40)
    low = np.minimum(rng.integers(0, 4, 40), high)
    total = int(rng.integers(low.sum(), high.sum() + 1))
    target = rng.dirichlet(np.ones(40)) * total
    solved = solve_qp(
        identity(40, format="csc"),
        -target,
        A=csc_matrix(np.ones((1, 40))),
        b=np.array([float(total)]),
        lb=low.astype(float),
        ub=high.astype(float),
        solver="osqp",
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=100_000,
    )
    assert (np.abs(allocate(target, low, high, total) - solved) < 1 + 1e-4).all()


def test_allocate_breaks_ties_by_group_and_scales() -> None:
    assert allocate(np.full(4, 2.5), np.zeros(4), np.full(4, 9), 10).tolist() == [3, 3, 2, 2]
    rng = np.random.default_rng(0)
    k = 50_000
    high = rng.integers(0, 20_000, k)
    low = np.minimum(1, high)
    total = int(high.sum() * 0.277)
    found = allocate(rng.dirichlet(np.full(k, 0.3)) * total, low, high, total)
    assert found.sum() == total
    assert ((low <= found) & (found <= high)).all()


@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e6, 1e6)), st.sampled_from([1e-3, 0.1, 1.0, 1e3])
)
def test_softmax(values: np.ndarray, temperature: float) -> None:
    weights = softmax(values, temperature)
    highest = max(values / temperature)
    powers = [float(np.exp(v / temperature - highest)) for v in values]
    assert weights.dtype == np.float64
    assert weights.tolist() == pytest.approx([p / sum(powers) for p in powers], rel=1e-12)


def test_softmax_by_hand() -> None:
    assert softmax(np.array([0, np.log(3)]), 1.0).tolist() == pytest.approx([0.25, 0.75])
    assert softmax(np.array([1e300, 0]), 1e-3).tolist() == [1.0, 0.0]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_pack_cuts_classes_into_runs(sizes, room) -> None:
    runs = list(pack(np.array(sizes, np.int64), room))
    seen = [k for lo, hi in runs for k in range(lo, hi)]
    assert seen == sorted(set(seen))
    assert all(sizes[k] == 0 for k in set(range(len(sizes))) - set(seen))
    for lo, hi in runs:
        filled = [size for size in sizes[lo:hi] if size]
        assert sum(filled) <= room or len(filled) == 1
