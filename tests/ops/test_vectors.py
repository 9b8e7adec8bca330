from __future__ import annotations

import math
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from thresher.ops.vectors import inverse_norms, norms_of, to_float32, unit_rows, units_of, without_direction

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)


def same_bits_or_both_nan(found: np.ndarray, expected: np.ndarray) -> bool:
    nan = np.isnan(expected)
    same = np.array_equal(np.isnan(found), nan)
    return same and np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


@pytest.mark.parametrize("width", [1, 16, 256, 2**16])
def test_every_float16_becomes_the_float32_numpy_makes_of_it(width: int) -> None:
    half = ALL_16_BITS.view(np.float16)
    found = to_float32(half.reshape(-1, width))
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = half.astype(np.float32)
    assert found.dtype == np.float32
    assert same_bits_or_both_nan(found.ravel(), expected)


def test_finite_float16_takes_the_short_way_to_the_same_bits() -> None:
    half = ALL_16_BITS.view(np.float16)
    finite = half[np.isfinite(half)].reshape(-1, 2)
    assert same_bits_or_both_nan(to_float32(finite).ravel(), finite.astype(np.float32).ravel())
    assert same_bits_or_both_nan(to_float32(finite[::3, ::-1]), finite[::3, ::-1].astype(np.float32))


def test_every_bfloat16_is_the_upper_half_of_a_float32() -> None:
    expected = np.array([struct.unpack("<f", struct.pack("<HH", 0, bits))[0] for bits in range(2**16)], np.float32)
    assert same_bits_or_both_nan(to_float32(ALL_16_BITS.reshape(256, 256)).ravel(), expected)


def test_float32_is_passed_on_and_float64_rounded() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(to_float32(rows), rows)
    assert to_float32(rows.T).flags.c_contiguous
    assert to_float32(np.array([[0.1, 1e-50]])).tolist() == [[np.float32(0.1), 0.0]]


def test_float64_beyond_float32_becomes_infinite_quietly() -> None:
    assert to_float32(np.array([[1e300, -1e300]])).tolist() == [[np.inf, -np.inf]]


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 6), st.integers(1, 5)),
        elements=st.one_of(
            st.floats(width=32), st.sampled_from([np.float32(x) for x in (0, 1e-45, 1e-39, 1e-30, 1e-19, 1e19, 3e38)])
        ),
    )
)
def test_rows_become_units_or_are_bad(rows: np.ndarray) -> None:
    """Bad: zero or not finite. The inverse of a norm is NaN too where it is beyond float32."""
    units, bad = unit_rows(rows)
    inverse = inverse_norms(rows)
    assert inverse.dtype == units.dtype == np.float32
    for i, row in enumerate(rows.astype(np.float64)):
        norm = math.hypot(*row.tolist()) if np.isfinite(row).all() else 0.0
        assert np.isnan(inverse[i]) == (norm == 0 or 1 / norm > float(np.finfo(np.float32).max))
        if norm == 0:
            assert i in bad
        else:
            assert i not in bad
            assert units[i] == pytest.approx(row / norm, abs=1e-6, rel=1e-5)


def test_units_of_every_magnitude() -> None:
    """Squares under- and overflow float32 outside about 1e-19 to 1e19; units must not."""
    exponents = np.arange(-38, 38)
    rows = np.array([[3, 4]]) * np.array([[10.0**e] for e in exponents])
    units, bad = unit_rows(rows.astype(np.float32))
    assert bad.tolist() == []
    np.testing.assert_allclose(units, np.tile([0.6, 0.8], (len(exponents), 1)), rtol=3e-7)


# --- the ends of the range ------------------------------------------------------------------------


def slow_units(rows: np.ndarray) -> np.ndarray:
    """Unit rows in float64, scaled by their largest value first; NaN where there is no direction."""
    out = np.full(rows.shape, np.nan)
    for i, row in enumerate(rows.astype(np.float64)):
        most = np.abs(row).max()
        if np.isfinite(most) and most > 0:
            scaled = [value / most for value in row.tolist()]
            length = math.sqrt(math.fsum(value * value for value in scaled))
            out[i] = [value / length for value in scaled]
    return out


SCALES = {
    np.float16: [6e-8, 1e-6, 1.0, 6e4],
    np.float32: [1.5e-45, 1e-44, 1e-40, 1e-38, 1e-30, 1e-20, 1.0, 1e18, 1e20, 1e30, 3e38],
    np.float64: [5e-324, 1e-310, 1e-200, 1e-50, 1e-40, 1e-30, 1.0, 1e20, 1e39, 1e100, 1e200, 1.7e308],
}


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_rows_of_any_size_are_normalised(dtype: Any, dim: int) -> None:
    rng = np.random.default_rng(dim)
    rows = []
    for scale in SCALES[dtype]:
        values = rng.uniform(-1, 1, (3, dim))
        values[:, 0] = 1  # so that no row is zero after rounding
        rows.append((values * scale).astype(dtype))
    stored = np.concatenate([*rows, np.zeros((1, dim), dtype), np.full((1, dim), np.nan, dtype)])
    last = np.ones((2, dim), dtype)
    last[0, -1], last[1, 0] = np.inf, -np.inf
    stored = np.concatenate([stored, last])
    wanted = slow_units(stored)
    bad = np.flatnonzero(np.isnan(wanted[:, 0]))
    assert len(bad) == 4

    units, without = units_of(stored.copy(), np.empty(stored.shape, np.float32))
    assert without.tolist() == bad.tolist()
    assert without_direction(stored).tolist() == np.isnan(wanted[:, 0]).tolist()
    np.testing.assert_allclose(np.delete(units, bad, 0), np.delete(wanted, bad, 0), rtol=3e-6, atol=1e-7)
    if dtype != np.float64:
        for in_place in (False, True):
            units, without = unit_rows(to_float32(stored.copy()), in_place=in_place)
            assert without.tolist() == bad.tolist()
            np.testing.assert_allclose(np.delete(units, bad, 0), np.delete(wanted, bad, 0), rtol=3e-6, atol=1e-7)

    norms = norms_of(stored)
    exact = [math.hypot(*row) for row in stored.astype(np.float64).tolist()]
    good = np.isfinite(stored).all(axis=1)
    exact = np.where(good, np.minimum(exact, sys.float_info.max), exact)
    np.testing.assert_allclose(norms[:-3], exact[:-3], rtol=1e-6)
    assert np.isnan(norms[-3])
    assert np.isinf(norms[-2:]).all()


def test_bfloat16_subnormals_are_normalised() -> None:
    bits = np.array([[1, 2], [0x7F7F, 0x7F7F], [0, 0], [0x7F80, 1], [0x7FC0, 1]], np.uint16)
    units, bad = units_of(bits, np.empty(bits.shape, np.float32))
    assert bad.tolist() == [2, 3, 4]
    np.testing.assert_allclose(units[:2], [[1 / 5**0.5, 2 / 5**0.5], [0.5**0.5] * 2], rtol=1e-6)
