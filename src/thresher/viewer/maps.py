"""The map of a pool as the page draws it: two whole numbers for each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.explore.map import PoolMap, map_of
from thresher.runtime.engine import make_engine
from thresher.viewer.subject import Subject

NOWHERE = 65_535  # both coordinates of a row without a place
_EDGE = 1.02  # the map reaches from -1 to 1; the few rows outside are drawn at the edge


def layout_of(subject: Subject) -> npt.NDArray[np.float32]:
    """Return the places of all rows, (N, 2) float32 from -1 to 1, NaN for rows without one."""
    return subject.kept.get("layout", lambda: _scaled(_made(subject)))


def points_of(subject: Subject) -> tuple[dict[str, Any], npt.NDArray[np.uint16]]:
    """Return what to know about the map, and the places of all rows, (N, 2) uint16: 0 is -1, and 65,534 is 1."""
    places_N2 = layout_of(subject)
    points = np.full(places_N2.shape, NOWHERE, np.uint16)
    for lo in range(0, len(points), 2**20):  # in parts, so that little memory is used
        part = places_N2[lo : lo + 2**20]
        good = ~np.isnan(part[:, 0])
        points[lo : lo + 2**20][good] = np.round((part[good] + 1) * ((NOWHERE - 1) / 2))
    return {"note": _made(subject).note}, points


def _made(subject: Subject) -> PoolMap:
    def made() -> PoolMap:
        labels_N = subject.labels(0) if subject.selections else None
        return map_of(subject.store(), subject.cache, labels_N=labels_N, engine=make_engine())

    return subject.kept.get("map", made)


def _scaled(found: PoolMap) -> npt.NDArray[np.float32]:
    places = np.empty((len(found.x), 2), np.float32)
    for axis, values in enumerate((found.x, found.y)):
        np.clip(values, -_EDGE, _EDGE, out=places[:, axis])
    places /= np.float32(_EDGE)
    return places
