"""The sample map of the page: some thousand rows as dots, coloured by the step that dropped them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.explore.map import map_of, sample_rows
from thresher.explore.names import ClusterNames
from thresher.pool.store import EmbeddingStore
from thresher.runtime.cache import Cache
from thresher.selection import Selection

POINTS = 5_000
SIDE = 1_000  # of the box
_LAID_OUT = 2_000  # rows of the sample; the others are placed next to these
_LABELS = 16
_HEIGHT, _WIDTH = 28, 13.5  # of a label: of a line, of a character
_LEAST = 8  # dots of a cluster that is named

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Dots:
    """The dots of one colour.

    Attributes:
        name: What they are: "kept", or the step that dropped them.
        path: The dots as a path of lines without length.
        count: Number of dots.
        rows: Number of rows of the pool that are like these.
    """

    name: str
    path: str
    count: int
    rows: int


@dataclass(frozen=True)
class Label:
    """A name of a cluster on the map."""

    x: int
    y: int
    text: str


@dataclass(frozen=True)
class SampleMap:
    """A map of a sample of the pool.

    Attributes:
        dots: Of the rows kept, then of those that each step dropped.
        labels: Names of clusters, which do not overlap.
        shown: Number of rows shown.
        total: Number of rows of the pool.
        note: How it was made and how to read it.
        size: Diameter of a dot.
    """

    dots: tuple[Dots, ...]
    labels: tuple[Label, ...]
    shown: int
    total: int
    note: str
    size: int


def sample_map(
    selection: Selection,
    store: EmbeddingStore,
    cache: Cache,
    points: int = POINTS,
    labels_N: npt.NDArray[Any] | None = None,
    names: ClusterNames | None = None,
) -> SampleMap | None:
    """Return a map of at most ``points`` random rows; None if the pool has no vectors, or no points are wanted.

    Args:
        selection: The selection.
        store: Its pool.
        cache: Where positions are kept.
        points: Number of rows.
        labels_N: (N,) clusters to name on the map.
        names: Their names.
    """
    if not points or not store.layout.vectors:
        return None
    rows = sample_rows(store.total, points, None, 0)
    found = map_of(store, cache, rows=rows, sample=_LAID_OUT)
    good = np.isfinite(found.x) & np.isfinite(found.y)
    rows, x, y = rows[good], np.asarray(found.x)[good], np.asarray(found.y)[good]
    at = np.stack([_scaled(x), _scaled(-y)], axis=1)
    by = np.asarray(selection.dropped_by)
    counts = np.bincount(by + 1, minlength=len(selection.steps) + 1)
    dots = []
    for number in range(-1, len(selection.steps)):
        inside = by[rows] == number
        name = "kept" if number < 0 else f"dropped by {number + 1}. {selection.steps[number].method}"
        if inside.any():
            path = "".join(f"M{px} {py}h0" for px, py in at[inside].tolist())
            dots.append(Dots(name, path, int(np.count_nonzero(inside)), int(counts[number + 1])))
    labels = _labels(at, labels_N[rows], names) if labels_N is not None and names is not None else ()
    size = int(np.clip(420 / np.sqrt(max(len(rows), 1)), 7, 22))
    return SampleMap(tuple(dots), labels, len(rows), store.total, found.note, size)


def _scaled(values: npt.NDArray[Any]) -> Ints:
    """Return positions from -1 to 1 as whole numbers in the box, with a margin."""
    return np.asarray(np.round(SIDE / 2 + np.clip(values, -1.05, 1.05) * SIDE * 0.465), np.int64)


def _labels(at: Ints, labels: npt.NDArray[Any], names: ClusterNames) -> tuple[Label, ...]:
    """Name the clusters with the most dots, unless a name would cover another one."""
    placed: list[tuple[float, float, float, float]] = []
    made: list[Label] = []
    sizes = np.bincount(labels[labels >= 0])
    for cluster in np.argsort(-sizes, kind="stable").tolist():
        text = ", ".join(names.words[cluster][:2])
        if len(made) == _LABELS or sizes[cluster] < _LEAST:
            break
        if not text:
            continue
        inside = at[labels == cluster]
        middle = np.median(inside, axis=0)
        # The dot nearest to the median, so that a name is never where the cluster is not.
        x, y = inside[((inside - middle) ** 2).sum(axis=1).argmin()].tolist()
        half = _WIDTH * len(text) / 2
        x = int(np.clip(x, half + 4, SIDE - half - 4))
        box = (x - half, y - _HEIGHT / 2, x + half, y + _HEIGHT / 2)
        if not any(_overlap(box, other) for other in placed):
            placed.append(box)
            made.append(Label(x, y, text))
    return tuple(made)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
