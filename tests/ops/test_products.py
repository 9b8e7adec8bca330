"""Products on the CPU and by torch: the same maxima, matches and sums as of the whole product."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.test_neighbors import units
from thresher.errors import UsageError
from thresher.ops import neighbors
from thresher.ops.components import find
from thresher.ops.kmeans import STRIPE, Assign, Bounds, MoveRows, nearest_two
from thresher.ops.products import ON_CPU, Products
from thresher.ops.torch_products import Devices, Held, TorchNearest, TorchProducts, check_devices, products_on

BY_TORCH = TorchProducts(Devices(("cpu",)), small=0)
BOTH = pytest.mark.parametrize("products", [ON_CPU, BY_TORCH], ids=["numpy", "torch"])


def whole(n: int, high: int, seed: int) -> np.ndarray:
    """Rows of small whole numbers, whose products are exact."""
    return np.random.default_rng(seed).integers(-high, high + 1, (n, 3)).astype(np.float32)


def counted(rows: np.ndarray, others: np.ndarray, lag: int | None) -> np.ndarray:
    """All products, those that do not count -inf."""
    full = rows @ others.T
    if lag is not None:
        for i in range(len(rows)):
            full[i, max(i + lag, 0) :] = -np.inf
    return full


@BOTH
@given(
    st.integers(1, 30), st.integers(1, 30), st.one_of(st.none(), st.integers(-40, 40)), st.integers(-9, 9),
    st.integers(0, 99),
)  # fmt: skip
def test_maxima_and_matches(products: Products, n: int, m: int, lag: int | None, threshold: int, seed: int) -> None:
    rows, others = whole(n, 2, seed), whole(m, 2, seed + 1)
    full = counted(rows, others, lag)
    top, column = products.best(rows, others, lag, products.scratch())
    np.testing.assert_array_equal(top, full.max(axis=1))
    np.testing.assert_array_equal(column, full.argmax(axis=1))  # the first of equal ones
    at, other = products.above(rows, others, threshold, lag)
    np.testing.assert_array_equal(np.stack([at, other]), np.nonzero(full > threshold))


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (1030, 7), (5, 4100), (4097, 4099)])
@pytest.mark.parametrize("clamp", [None, 0.0, -0.2, 0.3])
def test_sums(products: Products, shape: tuple[int, int], clamp: float | None) -> None:
    rows, others = units(shape[0], 4, 0), units(shape[1], 4, 1)
    full = rows.astype(np.float64) @ others.T.astype(np.float64)
    if clamp is not None:
        full[full < clamp] = 0
    by_row, by_column = products.sums(rows, others, clamp)
    assert by_row.dtype == by_column.dtype == np.float64
    np.testing.assert_allclose(by_row, full.sum(axis=1), atol=4e-3)  # a product may be on the other side of the clamp
    np.testing.assert_allclose(by_column, full.sum(axis=0), atol=4e-3)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 4095, 4097])
def test_nearest_centroids(products: Products, k: int) -> None:
    rows, centroids = units(300, 4, 1), units(k, 4, 2)
    labels, best, second = products.nearest(rows, centroids)
    full = np.sort(rows.astype(np.float64) @ centroids.T.astype(np.float64), axis=1)
    assert (labels.dtype, best.dtype, second.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_allclose(np.einsum("ij,ij->i", rows, centroids[labels]), full[:, -1], atol=1e-6)
    np.testing.assert_allclose(best, full[:, -1], atol=1e-6)
    np.testing.assert_allclose(second, full[:, -2] if k > 1 else -np.inf, atol=1e-6)


def test_ties_go_to_the_lower_centroid_across_tiles() -> None:
    rows, centroids = whole(200, 1, 0), whole(9000, 1, 1)  # each centroid is there many times
    labels, best, second = BY_TORCH.nearest(rows, centroids)
    expected = nearest_two(rows, centroids)
    for found, other in zip((labels, best, second), expected, strict=True):
        np.testing.assert_array_equal(found, other)


@pytest.mark.parametrize("n", [1, 1500, neighbors.CHUNK + 5, 2 * neighbors.CHUNK + 100])
def test_searches_are_those_of_the_cpu(n: int) -> None:
    """Decisions are the same; cosines differ by rounding, so that of equal rows the first one is found by both."""
    rows = units(n, 8, n, copies=n // 3)

    def load(lo: int, hi: int) -> np.ndarray:
        return rows[lo:hi]

    start = n // 3
    best, where = neighbors.nearest_earlier(load, start, n, BY_TORCH)
    expected, at = neighbors.nearest_earlier(load, start, n)
    np.testing.assert_allclose(best, expected, atol=1e-6)
    np.testing.assert_array_equal(rows[where], rows[at])
    kept, first = neighbors.duplicates_of_kept(load, n, 0.98, BY_TORCH)
    expected, at = neighbors.duplicates_of_kept(load, n, 0.98)
    np.testing.assert_allclose(kept, expected, atol=1e-6)
    np.testing.assert_array_equal(kept > 0.98, expected > 0.98)
    np.testing.assert_array_equal(rows[first], rows[at])
    links = neighbors.linked_to_earlier(load, start, n, 0.98, BY_TORCH)
    np.testing.assert_array_equal(links, neighbors.linked_to_earlier(load, start, n, 0.98))
    assert len(find(links, np.arange(n))) == n
    others = [rows[lo : lo + 700] for lo in range(0, n, 700)]
    best, where = neighbors.nearest_other(units(300, 8, 5), others, BY_TORCH)
    expected, at = neighbors.nearest_other(units(300, 8, 5), others)
    np.testing.assert_allclose(best, expected, atol=1e-6)
    np.testing.assert_array_equal(rows[where], rows[at])


def test_large_stripes_move_the_same_rows() -> None:
    """Sums are taken of as many rows as on the CPU, whatever the number of rows that are multiplied at once."""

    class Large(TorchNearest):
        stripe = 4 * STRIPE  # type: ignore[assignment]

    rows, centroids = units(7000, 16, 0), units(20, 16, 1)
    for before in (np.full(7000, -1, np.int32), np.zeros(7000, np.int32)):
        made = []
        for nearest in (TorchNearest(BY_TORCH.devices, "float32"), Large(BY_TORCH.devices, "float32")):
            bounds = Bounds(before.copy(), np.zeros(7000, np.float32), np.zeros(7000, np.float32))
            rule = MoveRows(centroids, np.zeros(20, np.float32), nearest, bounds="taken")
            assert rule.stripe == (4 * STRIPE if isinstance(nearest, Large) else STRIPE)
            made.append(rule((rows[lo : lo + rule.stripe] for lo in range(0, 7000, rule.stripe)), bounds))
        np.testing.assert_array_equal(made[0].sums_JD, made[1].sums_JD)
        np.testing.assert_array_equal(made[0].counts_J, made[1].counts_J)
        np.testing.assert_array_equal(made[0].bounds.labels_B, made[1].bounds.labels_B)


def test_few_products_are_made_by_numpy() -> None:
    rows, others = units(40, 5, 0), units(30, 5, 1)
    found = TorchProducts(Devices(("cuda:7",))).best(rows, others)  # a device that is not there is not used
    for one, other in zip(found, ON_CPU.best(rows, others), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_workers_of_other_processes_get() -> None:
    rows, centroids = units(50, 5, 0), units(6, 5, 1)
    rule = Assign(centroids, BY_TORCH.nearest)
    expected = rule(iter([rows]))  # now it holds centroids on the device
    again = pickle.loads(pickle.dumps(rule))(iter([rows]))
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert pickle.loads(pickle.dumps(BY_TORCH)) == BY_TORCH
    held = pickle.loads(pickle.dumps(Held(centroids, "bfloat16")))
    assert held.on("cpu").dtype == torch.bfloat16


def test_devices_take_turns() -> None:
    devices = Devices.named("cuda:0,cuda:2")
    assert devices.names == ("cuda:0", "cuda:2")
    one = Devices(("cpu", "cpu"))
    with one.next() as first, one.next() as second:
        assert (first, second, torch.get_num_threads()) == ("cpu", "cpu", 1)


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("auto", "cpu"):
        check_devices(name)
        assert products_on(name) is ON_CPU
    for wrong in ("gpu", "cuda:", "cuda:x", "cuda:0,", "mps", "", "cuda:0,cpu"):
        with pytest.raises(UsageError, match=r"give cpu, cuda \(all GPUs\), or some of them, such as cuda:0,cuda:1"):
            check_devices(wrong, here=False)
    check_devices("cuda", here=False)  # the nodes of a cluster have them
    check_devices("torch-cpu")
    assert products_on("cuda:0,cuda:1") == TorchProducts(Devices(("cuda:0", "cuda:1")))
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UsageError, match=r"call torch.set_float32_matmul_precision\('highest'\)"):
            check_devices("torch-cpu")
    finally:
        torch.set_float32_matmul_precision("highest")
    fake: dict[str, Any] = {"is_available": lambda: True, "device_count": lambda: 2}
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    check_devices("cuda:1")
    with pytest.raises(UsageError, match=r"^--device cuda:2: torch \S+ finds 2 GPUs here; pass --device cpu$"):
        check_devices("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU here"):
        check_devices("cuda")
