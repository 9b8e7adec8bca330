"""Casts and norms: from stored values to float32 unit rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

_STRIPE = 256  # rows cast at a time: the temporary stays in cache
_HUGE = 2**20  # float32 values from which NumPy asks for huge pages


def workspace(rows: int, columns: int) -> F32:
    """Return uninitialised float32 memory (rows, columns) for results that are overwritten many times.

    New memory in small pages costs more than half of the product that fills it: reuse it, and let it have huge pages.
    """
    return np.empty(max(rows * columns, _HUGE), np.float32)[: rows * columns].reshape(rows, columns)


def to_float32(rows_BD: npt.NDArray[Any], out: F32 | None = None) -> F32:
    """Return float32 values of float16, float32, float64 or bfloat16-as-uint16 rows, exactly.

    float16 is cast with integer shifts and one multiplication, three times as fast as NumPy; stripes with infinities
    or NaN are cast by NumPy. ``out`` (B, D) float32 saves an allocation.
    """
    if out is None:
        if rows_BD.dtype == np.float32:
            return np.ascontiguousarray(rows_BD)
        out = np.empty(rows_BD.shape, np.float32)
    if rows_BD.dtype == np.uint16:
        wide = out.view(np.uint32)
        np.copyto(wide, rows_BD)
        np.left_shift(wide, 16, out=wide)
    elif rows_BD.dtype == np.float16 and rows_BD.ndim == 2:
        sign = np.empty((min(_STRIPE, len(rows_BD)), rows_BD.shape[1]), np.uint32)
        for lo in range(0, len(rows_BD), _STRIPE):
            half = rows_BD[lo : lo + _STRIPE]
            _cast_half(half, out[lo : lo + _STRIPE], sign[: len(half)])
    else:
        with np.errstate(over="ignore"):  # too large float64 values become infinite, and are reported as such
            np.copyto(out, rows_BD, casting="same_kind")
    return out


def _cast_half(half: npt.NDArray[np.float16], out: F32, sign: npt.NDArray[np.uint32]) -> None:
    wide = out.view(np.uint32)
    np.copyto(wide, half.view(np.uint16))
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, np.uint32(0x10000000), out=sign)
    np.bitwise_and(wide, np.uint32(0x0FFFE000), out=wide)
    special = int(wide.max(initial=0)) >= 0x0F800000  # exponent all ones: infinity or NaN
    np.left_shift(sign, 3, out=sign)
    np.bitwise_or(wide, sign, out=wide)
    # The exponent bias differs by 112; the multiply also normalises subnormals.
    np.multiply(out, np.float32(2.0**112), out=out)
    if special:
        with np.errstate(invalid="ignore"):  # signalling NaN
            out[...] = half


def inverse_norms(rows_BD: F32) -> F32:
    """Return 1 / ||row|| as (B,) float32; NaN for rows that are zero, not finite, or too small for it."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", rows_BD, rows_BD)
        inverse = np.float32(1) / np.sqrt(squares)
    # float32 squares leave the normal range for norms outside about 1e-18..1e18.
    doubtful = np.flatnonzero(~((squares > 1e-30) & (squares < 1e37)))
    if len(doubtful):
        wide = rows_BD[doubtful].astype(np.float64)
        with np.errstate(all="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
            exact = (1.0 / norms).astype(np.float32)
        exact[~np.isfinite(norms) | (norms == 0) | ~np.isfinite(exact)] = np.nan
        inverse[doubtful] = exact
    return np.asarray(inverse, np.float32)


def unit_rows(rows_BD: F32, *, in_place: bool = False) -> tuple[F32, npt.NDArray[np.int64]]:
    """Return L2-normalised rows and the positions of rows that have no direction (zero, NaN, infinite).

    With ``in_place``, ``rows_BD`` is overwritten.
    """
    return _units(rows_BD, rows_BD, rows_BD if in_place else np.empty_like(rows_BD))


def units_of(rows_BD: npt.NDArray[Any], out: F32) -> tuple[F32, npt.NDArray[np.int64]]:
    """Return the L2-normalised float32 rows of stored values, as :func:`unit_rows`; ``out`` (B, D) is overwritten.

    float64 rows whose values are beyond the range of float32 are normalised too.
    """
    with np.errstate(invalid="ignore"):  # signalling NaN
        rows = to_float32(rows_BD, out)
    return _units(rows_BD, rows, out)


def without_direction(rows_BD: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which rows of stored values cannot be normalised because they are zero, NaN or infinite, (B,)."""
    out = np.empty(rows_BD.shape, np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        inverse = inverse_norms(to_float32(rows_BD, out))
    bad = np.zeros(len(rows_BD), np.bool_)
    if len(odd := _outside(inverse)):
        bad[odd] = np.isnan(_exact_units(rows_BD[odd])[:, 0])
    return bad


def norms_of(rows_BD: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the norms of rows of stored values, (B,): right for the smallest and the largest values of each type.

    NaN for a row with NaN, infinity for a row with an infinity.
    """
    wide = _wide(rows_BD)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        if rows_BD.dtype == np.float64 and len(odd := np.flatnonzero(~((norms > 1e-140) & (norms < 1e150)))):
            most = np.abs(wide[odd]).max(axis=1, initial=0)  # the squares of these leave the range of float64
            finite = np.isfinite(most)
            scaled = wide[odd[finite]] / np.where(most[finite] > 0, most[finite], 1)[:, None]
            exact = most[finite] * np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
            norms[odd] = most
            norms[odd[finite]] = np.minimum(exact, np.finfo(np.float64).max)
    return np.asarray(norms, np.float64)


def _units(stored_BD: npt.NDArray[Any], rows_BD: F32, out: F32) -> tuple[F32, npt.NDArray[np.int64]]:
    """Normalise float32 rows; those whose norm is too large or too small for float32 from the stored values."""
    inverse = inverse_norms(rows_BD)
    odd = _outside(inverse)
    exact = _exact_units(stored_BD[odd]) if len(odd) else None
    with np.errstate(invalid="ignore", over="ignore"):
        np.multiply(rows_BD, inverse[:, None], out=out)
    if exact is None:
        return out, odd
    out[odd] = exact
    return out, odd[np.isnan(exact[:, 0])]


def _outside(inverse: F32) -> npt.NDArray[np.int64]:
    return np.flatnonzero(~((inverse > 1e-37) & (inverse < 1e30)))  # NaN too


def _exact_units(rows_BD: npt.NDArray[Any]) -> F32:
    """Return unit rows that are scaled before they are squared; NaN for rows without a direction."""
    wide = _wide(rows_BD)
    most = np.abs(wide).max(axis=1, initial=0)
    good = np.isfinite(most) & (most > 0)
    units = np.full(wide.shape, np.nan, np.float32)
    scaled = wide[good] / most[good, None]
    units[good] = scaled / np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    return units


def _wide(rows_BD: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray(rows_BD if rows_BD.dtype == np.float64 else to_float32(rows_BD), np.float64)
