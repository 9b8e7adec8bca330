"""Sets of rows that a person asks for: kept or dropped, by a step, of a cluster, with a word, in a range, in a lasso.

A set is described by plain values from the address of a request, which are checked here. The result is ids of rows, in
the order in which they are shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.pool.store import EmbeddingStore, missing
from thresher.runtime.untrusted import parse_json
from thresher.viewer.subject import Cut, Subject

Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int32]

ORDERS = ("row", "low", "high", "cluster", "mixed")
_WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
_CORNERS = 400  # of a lasso
_WORDS = 400  # characters of a search
_MIXED = 2_654_435_761  # rows are mixed by multiplication: the same rows first in every set


@dataclass(frozen=True)
class Wanted:
    """A set of rows; every part that is given narrows it.

    Attributes:
        selection: Number of the selection that "kept" and steps refer to.
        cut: Another cut of it.
        kept: Only kept rows, or only dropped ones.
        step: Only rows that this step dropped, from 0.
        scored: The step whose scores count, from 0 (default: the last one that has scores).
        low: Only rows with at least this score.
        high: Only rows with at most this score.
        cluster: Only rows of this cluster.
        clustered: The step that clustered, from 0 (default: the one that clustered the most rows).
        search: Only rows whose caption contains this, or whose key is this; ``row:17`` is a row by number.
        column: Only rows with ``value`` in this column, or with a number from ``least`` to ``most``.
        polygon: Only rows inside this lasso, corners in units of the map.
        alone: Only rows that this selection keeps and no other one does.
        moved: Only rows that the cut keeps and the selection as it was does not ("in"), or the other way round ("out").
        order: "row", "low" and "high" scores first, "cluster", or "mixed".
    """

    selection: int | None = None
    cut: Cut | None = None
    kept: bool | None = None
    step: int | None = None
    scored: int | None = None
    low: float | None = None
    high: float | None = None
    cluster: int | None = None
    clustered: int | None = None
    search: str = ""
    column: str = ""
    value: str | None = None
    least: float | None = None
    most: float | None = None
    polygon: tuple[tuple[float, float], ...] = ()
    alone: int | None = None
    moved: str = ""
    order: str = "row"

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Read a set from JSON.

        Raises:
            UsageError: It is not one; the message names what is wrong.
        """
        try:
            given = parse_json(text or "{}")
        except ValueError as error:
            raise UsageError(f"not JSON: {error}") from None
        if not isinstance(given, dict):
            raise UsageError("a set of rows is an object")
        if unknown := given.keys() - cls.__dataclass_fields__.keys():
            raise UsageError(f"unknown: {', '.join(sorted(map(repr, unknown)))[:200]}")
        made: dict[str, Any] = {}
        for name in ("selection", "step", "scored", "cluster", "clustered", "alone"):
            made[name] = _whole(given, name)
        for name in ("low", "high", "least", "most"):
            made[name] = _real(given, name)
        for name in ("search", "column", "moved"):
            made[name] = _text(given, name) or ""
        made["value"] = _text(given, "value")
        made["order"] = _text(given, "order") or "row"
        if made["order"] not in ORDERS:
            raise UsageError(f"order = {made['order'][:40]!r}: give one of {', '.join(ORDERS)}")
        if made["moved"] not in ("", "in", "out"):
            raise UsageError("moved: give in or out")
        kept = given.get("kept")
        if kept is not None and not isinstance(kept, bool):
            raise UsageError("kept: give true or false")
        return cls(**made, kept=kept, cut=cut_of(given.get("cut")), polygon=_polygon(given.get("polygon")))


def cut_of(given: Any) -> Cut | None:
    """Return a cut from ``["keep", "30%"]``.

    Raises:
        UsageError: It is not one.
    """
    if given is None:
        return None
    if not (isinstance(given, list) and len(given) == 2 and all(isinstance(part, str) for part in given)):
        raise UsageError("cut: give the name of a parameter and its value")
    if len(given[1]) > 40:
        raise UsageError("cut: give a value of at most 40 characters")
    return Cut(*given)


def rows_of(subject: Subject, wanted: Wanted, source: int = 0) -> Ids:
    """Return the ids of the rows of a set, in its order, (M,) int32; the last few sets are kept.

    Raises:
        UsageError: It refers to something that there is not.
    """
    return subject.kept.get(("rows", source, wanted), lambda: _found(subject, wanted, source))


def _found(subject: Subject, wanted: Wanted, source: int) -> Ids:
    store = subject.store(source)
    # From the cheapest to the most expensive, which then only looks at rows that are left.
    mask_N = np.ones(store.total, np.bool_)
    number, cut = wanted.selection, wanted.cut
    if source and (number is not None or wanted.alone is not None or wanted.column or wanted.polygon):
        raise UsageError("selections, columns and the map are those of the first pool")
    if number is not None:
        dropped_by = subject.selection(number, cut).dropped_by
        if wanted.kept is not None:
            mask_N &= (dropped_by == -1) == wanted.kept
        if wanted.step is not None:
            mask_N &= dropped_by == wanted.step
        if wanted.moved:
            before_N, now_N = subject.selection(number).dropped_by == -1, dropped_by == -1
            mask_N &= now_N & ~before_N if wanted.moved == "in" else before_N & ~now_N
    elif wanted.kept is not None or wanted.step is not None or wanted.moved:
        raise UsageError("kept, step and moved need a selection")
    if wanted.alone is not None:
        subject.selection(wanted.alone)  # checks that there is one
        for other in range(len(subject.selections)):
            mask_N &= (subject.selection(other).dropped_by == -1) == (other == wanted.alone)
    if wanted.cluster is not None:
        labels = None if number is None else subject.labels(number, wanted.clustered)
        if labels is None:
            raise UsageError("there are no clusters")
        mask_N &= labels == wanted.cluster
    if wanted.low is not None or wanted.high is not None:
        mask_N &= _between(_scores(subject, wanted), wanted.low, wanted.high)
    if wanted.column:
        mask_N &= _of_column(subject, wanted)
    if wanted.polygon:
        from thresher.viewer.maps import layout_of

        at = np.flatnonzero(mask_N)
        mask_N[at] = inside(layout_of(subject)[at], wanted.polygon)
    if wanted.search:
        mask_N = searched(store, wanted.search, mask_N)
    return _ordered(subject, wanted, np.flatnonzero(mask_N).astype(np.int32))


def _ordered(subject: Subject, wanted: Wanted, ids: Ids) -> Ids:
    if wanted.order in ("low", "high"):
        scores = _scores(subject, wanted)[ids]
        return ids[np.argsort(scores if wanted.order == "low" else -scores, kind="stable")]  # NaN comes last
    if wanted.order == "cluster":
        labels = None if wanted.selection is None else subject.labels(wanted.selection, wanted.clustered)
        if labels is None:
            raise UsageError("there are no clusters")
        return ids[np.argsort(labels[ids], kind="stable")]
    if wanted.order == "mixed":
        return ids[np.argsort(ids.astype(np.uint32) * np.uint32(_MIXED), kind="stable")]
    return ids


def scored_step(subject: Subject, wanted: Wanted) -> int:
    """Return the step whose scores count.

    Raises:
        UsageError: None has scores.
    """
    if wanted.selection is None:
        raise UsageError("scores need a selection")
    if wanted.scored is not None:
        return wanted.scored
    steps = subject.selection(wanted.selection).steps
    having = [i for i, step in enumerate(steps) if "score" in step.rows]
    if not having:
        raise UsageError("no step of this selection has scores")
    return having[-1]


def _scores(subject: Subject, wanted: Wanted) -> npt.NDArray[np.float32]:
    step = scored_step(subject, wanted)
    return subject.scores(wanted.selection or 0, wanted.cut, step)


def _between(values: npt.NDArray[Any], low: float | None, high: float | None) -> Bools:
    """Return which numbers are in a range, exactly, (N,) bool; nulls and NaN are not."""
    mask = np.ones(len(values), np.bool_)
    mask[missing(values)] = False
    numbers = np.ma.getdata(values)
    if numbers.dtype.kind in "biu":  # compared as whole numbers: a float does not hold all of them
        low = None if low is None else math.ceil(low)
        high = None if high is None else math.floor(high)
    with np.errstate(invalid="ignore", over="ignore"):
        if low is not None:
            mask &= numbers >= low
        if high is not None:
            mask &= numbers <= high
    return mask


def _of_column(subject: Subject, wanted: Wanted) -> Bools:
    column = subject.column(wanted.column)
    if column.kind != "text":
        if wanted.value is not None:
            number = _number(wanted.value)
            return _between(subject.numbers(column.name), number, number)
        return _between(subject.numbers(column.name), wanted.least, wanted.most)
    values = subject.values(column.name)
    if wanted.value is None:
        return np.asarray(values.codes_N == len(values.names), np.bool_)
    if wanted.value not in values.names:
        raise UsageError(f"{column.name}: {wanted.value[:40]!r} is not one of its most frequent values")
    return np.asarray(values.codes_N == values.names.index(wanted.value), np.bool_)


def searched(store: EmbeddingStore, words: str, among_N: Bools) -> Bools:
    """Return which rows, among some, have a caption that contains a text in any case, or exactly this key, (N,) bool.

    Args:
        store: The pool; its captions are read from the files, some at a time.
        words: The text; ``row:17`` names a row by number.
        among_N: (N,) bool, the rows among which to search.
    """
    found = np.zeros(store.total, np.bool_)
    number = words.removeprefix("row:")
    if words.startswith("row:") and number.isdecimal() and len(number) < 19:
        if int(number) < store.total:
            found[int(number)] = among_N[int(number)]
        return found
    names = list(dict.fromkeys(name for name in (store.layout.caption, store.layout.key) if name))
    if not names:
        raise UsageError("this pool has no captions and no keys; search for row:NUMBER")
    for ids, part in store.where(among_N).scan(names) if among_N.any() else ():
        for name, column in zip(names, part.columns, strict=True):
            found[ids] |= _contains(column, words, whole=name != store.layout.caption)
    return found


def _contains(column: Any, words: str, *, whole: bool) -> Bools:
    import pyarrow as pa
    import pyarrow.compute as pc

    from thresher.pool.layout import texts

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = pa.array(texts(column), pa.large_string())
    if whole:
        hits = pc.equal(column, pa.scalar(words, column.type))
    else:
        hits = pc.match_substring(column, words, ignore_case=True)
    return np.asarray(hits.fill_null(False).to_numpy(zero_copy_only=False), np.bool_)


def inside(points_M2: npt.NDArray[np.float32], corners: Sequence[tuple[float, float]]) -> Bools:
    """Return which points are inside a polygon by the even-odd rule, (M,) bool; NaN is outside."""
    polygon = np.asarray(corners, np.float64)
    x, y = points_M2[:, 0].astype(np.float64), points_M2[:, 1].astype(np.float64)
    (left, bottom), (right, top) = polygon.min(axis=0), polygon.max(axis=0)
    result = np.zeros(len(points_M2), np.bool_)
    with np.errstate(invalid="ignore"):
        near = np.flatnonzero((x >= left) & (x <= right) & (y >= bottom) & (y <= top))
        x, y = x[near], y[near]
        within = np.zeros(len(near), np.bool_)
        for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            crosses = (y1 > y) != (y2 > y)
            if crosses.any():
                within ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    result[near] = within
    return result


# --- plain values ---------------------------------------------------------------------------------


def _whole(given: Mapping[str, Any], name: str) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise UsageError(f"{name}: give a whole number")
    return value


def _real(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UsageError(f"{name}: give a number")
    return float(value)


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _WORDS:
        raise UsageError(f"{name}: give a text of at most {_WORDS} characters")
    if any("\ud800" <= one <= "\udfff" for one in value):
        raise UsageError(f"{name}: has half of a character")
    return value


def _number(text: str) -> float:
    """Return a number; a whole one exactly, as an int."""
    try:
        number = int(text) if _WHOLE.fullmatch(text) else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"value = {text[:40]!r}: give a number")
    return number


def _polygon(given: Any) -> tuple[tuple[float, float], ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not 3 <= len(given) <= _CORNERS:
        raise UsageError(f"polygon: give 3 to {_CORNERS} corners")
    corners = []
    for corner in given:
        if not isinstance(corner, list) or len(corner) != 2:
            raise UsageError("polygon: a corner has two numbers")
        corners.append(tuple(_real({"corner": value}, "corner") for value in corner))
    if any(value is None or abs(value) > 1e6 for corner in corners for value in corner):
        raise UsageError("polygon: a corner has two numbers")
    return tuple(corners)  # type: ignore[arg-type]
