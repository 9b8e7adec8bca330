"""Move the cut of a step in the page: counts of its scores in narrow bins, and what to type for another cut."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.report.facts import Judged, apart_from_reference, histogram, usable_scores

_FINER = 4  # narrow bins in one of the histogram
_DROPPED_AS_DUPLICATES = "duplicate_of"


@dataclass(frozen=True)
class Slider:
    """A cut that can be moved.

    Attributes:
        data: JSON for the script of the page: "edges" (B + 1), "rows" (B), "above" (whether rows above the cut are
            kept), "outside" (rows kept at any cut shown), "total", "now" (index of the cut among the edges), "kept"
            (rows kept at it) and "parameter" ("eps", "threshold" or "keep").
        last: B, the last position.
        now: Position of the cut.
        path: The histogram as the path of an area in a box of B by 100.
        above: Whether rows above the cut are kept.
        kept: Rows kept at the cut.
        total: Rows of the step.
        about: Whether another cut only gives about these counts, because rows are compared with kept ones.
    """

    data: str
    last: int
    now: int
    path: str
    above: bool
    kept: int
    total: int
    about: bool

    @property
    def inset(self) -> str:
        """How the area of the kept rows is cut out at first, as a CSS value."""
        at = 100 * self.now / self.last
        return f"inset(0 0 0 {at:.3f}%)" if self.above else f"inset(0 {100 - at:.3f}% 0 0)"


def slider(of: Judged) -> Slider | None:
    """Return a slider for a step that kept exactly the rows on one side of a cut; else None."""
    step = of.step
    found = histogram(of)
    if found is None or step.cut is None or not np.isfinite(step.cut) or apart_from_reference(step):
        return None
    scores, good = usable_scores(step)
    values, kept = scores[good].astype(np.float64), of.kept_n[good]
    if not kept.any() or kept.all():
        return None
    above = bool(values[kept].min() >= values[~kept].max())
    if not above and values[kept].max() > values[~kept].min():
        return None
    edges = np.unique(
        np.concatenate(
            [np.linspace(a, b, _FINER, endpoint=False) for a, b in zip(found.edges, found.edges[1:], strict=False)]
            + [found.edges[-1:]]
        )
    )
    if not edges[0] < step.cut < edges[-1]:
        return None
    rows = np.histogram(values, edges)[0]
    # Rows beyond the axis on the side that is kept, and those without a score that were kept.
    beyond = np.count_nonzero(values > edges[-1] if above else values < edges[0])
    now = int(np.abs(edges - step.cut).argmin())
    outside = int(beyond) + found.apart_kept
    data = {
        "edges": [float(f"{edge:.6g}") for edge in edges.tolist()],
        "rows": rows.tolist(),
        "above": above,
        "outside": outside,
        "total": step.rows_in,
        "now": now,
        "kept": step.rows_out,
        "parameter": _parameter(step.parameters),
    }
    top = max(int(rows.max()), 1)
    heights = [round(100 - 100 * int(count) / top, 1) for count in rows.tolist()]
    path = "M0 100" + "".join(f"V{height:g}H{i + 1}" for i, height in enumerate(heights)) + "V100Z"
    duplicates = _DROPPED_AS_DUPLICATES in step.rows
    return Slider(
        data=json.dumps(data, separators=(",", ":")),
        last=len(rows),
        now=now,
        path=path,
        above=above,
        kept=step.rows_out,
        total=step.rows_in,
        about=duplicates and step.parameters.get("against") != "all",
    )


def _parameter(parameters: Any) -> str:
    """Return the parameter that moves the cut."""
    return next((name for name in ("keep", "eps", "threshold") if parameters.get(name) is not None), "")
