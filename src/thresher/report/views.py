"""What the page of a selection shows: its steps, their clusters and the covariance error, ready for the template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.explore.names import ClusterNames, cluster_names
from thresher.pool.store import EmbeddingStore
from thresher.pruning.audit import Audit
from thresher.pruning.covariance import CovarianceError, Deviation
from thresher.report import figures
from thresher.report.facts import (
    Clusters,
    Histogram,
    Judged,
    Pair,
    Parameter,
    Reason,
    Repeats,
    Strip,
    chains_of,
    clusters,
    extremes,
    histogram,
    in_clusters,
    number,
    origins,
    pairs,
    parameters,
    plain,
    reasons,
    repeats,
    strips,
)
from thresher.report.slider import Slider, slider
from thresher.runtime.format import counted, percent
from thresher.selection import Step

_PURPOSES = {"coreset": "Keep the rows that were least redundant in a training run."}  # steps that are not methods
_EARLIER, _TO_REFERENCE = "cosine to the nearest earlier row", "cosine to the nearest row of the reference"
_LABELS = {
    "d_intra": "spread: mean distance to the centroid (d_intra)",
    "d_inter": "distance to the nearest centroids (d_inter)",
    "quota": "quota (rows)",
    "complexity": "complexity (d_inter \u00d7 d_intra)",
}
_UNITS = ("cosine", "distance", "probability", "loss", "rank", "gain")


@dataclass(frozen=True)
class Cell:
    """A cluster in the tables, with strips of its rows if there is a store.

    ``name`` are the words that set it apart, or its own name; ``row`` is one that represents it, -1 for none.
    """

    cluster: int
    size: int
    kept: int
    more: tuple[str, ...]
    strips: tuple[Strip, ...]
    name: str = ""
    row: int = -1


@dataclass(frozen=True, eq=False)
class StepView:
    """A step as the page shows it."""

    number: int
    step: Step
    anchor: str
    purpose: str
    parameters: tuple[Parameter, ...]
    origins: tuple[str, ...]
    reasons: tuple[Reason, ...]
    histogram: Histogram | None
    charts: Mapping[str, str]
    clusters: Clusters | None
    columns: tuple[str, ...]
    most: tuple[Cell, ...]
    least: tuple[Cell, ...]
    near: tuple[Pair, ...]
    far: tuple[Pair, ...]
    repeats: Repeats | None
    strips: tuple[Strip, ...]
    slider: Slider | None = None
    names: ClusterNames | None = None

    @classmethod
    def of(cls, judged: Judged, examples: int, cells: int, store: EmbeddingStore | None = None) -> StepView:
        """Compute everything about one step; only names of clusters and the rows that represent them need the pool."""
        step, anchor = judged.step, f"step-{judged.number + 1}"
        scored, groups = histogram(judged), clusters(judged)
        most, least = extremes(groups, cells) if groups is not None else ([], [])
        names = _names(judged, groups, store) if examples and cells else None
        inside = in_clusters(judged, [*most, *least], examples)
        near, far = pairs(judged, examples)
        again = repeats(judged, examples)
        charts = dict.fromkeys(("scores", "reference", "shares", "sizes"), "")
        if scored is not None:
            label = _EARLIER if scored.elsewhere else plain(step.score, 60) or "score"
            charts["scores"] = figures.scores(f"{anchor}-scores", scored, label, step.cut)
        if again is not None and again.histogram is not None:
            charts["reference"] = figures.scores(
                f"{anchor}-reference", again.histogram, _TO_REFERENCE, again.cut, ("other", "repeating")
            )
        if groups is not None and groups.difficulty:
            charts["shares"] = figures.shares(f"{anchor}-shares", groups)
        if groups is not None:
            charts["sizes"] = figures.sizes(f"{anchor}-sizes", groups)

        return cls(
            number=judged.number + 1,
            step=step,
            anchor=anchor,
            purpose=_purpose(step.method),
            parameters=() if chains_of(step.method, step.parameters) else parameters(step.method, step.parameters),
            origins=origins(step),
            reasons=reasons(judged),
            histogram=scored,
            charts=charts,
            clusters=groups,
            columns=tuple(_LABELS.get(name, name.replace("_", " ")) for name in groups.more) if groups else (),
            most=_cells(groups, most, inside, names),
            least=_cells(groups, least, inside, names),
            near=near,
            far=far,
            repeats=again,
            strips=strips(judged, examples),
            slider=slider(judged),
            names=names,
        )

    @property
    def unit(self) -> str:
        """What a score of the step is, in one word to put before it."""
        if "marks" in self.step.rows:
            return "epochs"
        words = self.step.score.lower()
        return next((word for word in _UNITS if word in words), "score")

    @property
    def is_audit(self) -> bool:
        """Whether the step is the audit that skips bad rows, not a method."""
        return self.step.method == Audit.name

    def rows(self) -> Iterator[int]:
        """Yield the global ids of all rows shown."""
        inside = [strip for cell in (*self.most, *self.least) for strip in cell.strips]
        yield from (cell.row for cell in (*self.most, *self.least) if cell.row >= 0)
        for strip in (*self.strips, *inside):
            yield from (tile.row for tile in strip.tiles)
        for pair in (*self.near, *self.far):
            yield from (pair.row, pair.of)
        if self.repeats is not None:
            yield from (pair.row for pair in (*self.repeats.near, *self.repeats.far))


@dataclass(frozen=True)
class CovarianceView:
    """The covariance error as the page shows it: table rows, and the clusters with the largest share."""

    error: CovarianceError
    lines: tuple[tuple[str, Deviation], ...]
    worst: tuple[Cell, ...]

    @classmethod
    def of(cls, error: CovarianceError, cells: int) -> CovarianceView:
        """Name each number."""
        inside = f"within {counted(error.classes, 'cluster')}"
        lines = {
            "overall": error.overall,
            inside: error.within,
            "overall, not centred": error.overall_uncentred,
            f"{inside}, not centred": error.within_uncentred,
        }
        worst = tuple(
            Cell(entry.label, entry.rows, entry.kept, (number(entry.error), percent(entry.share, 1)), ())
            for entry in error.worst(cells)
        )
        return cls(error, tuple((name, deviation) for name, deviation in lines.items() if deviation is not None), worst)


def labels_of(judged: Judged) -> npt.NDArray[np.int32]:
    """Return the cluster of every row of the pool in a step, (N,) int32, -1 for rows that the step did not see."""
    labels = np.full(len(judged.given_N), -1, np.int32)
    labels[judged.given_N] = judged.step.rows["cluster"]
    return labels


def _names(judged: Judged, groups: Clusters | None, store: EmbeddingStore | None) -> ClusterNames | None:
    if groups is None or store is None or "cluster" not in judged.step.rows:
        return None
    return cluster_names(store, labels_of(judged), clusters=len(groups.size_K))


def _cells(
    groups: Clusters | None,
    chosen: Sequence[int],
    inside: Mapping[int, tuple[Strip, ...]],
    names: ClusterNames | None,
) -> tuple[Cell, ...]:
    if groups is None:
        return ()
    return tuple(
        Cell(
            cluster=j,
            size=int(groups.size_K[j]),
            kept=int(groups.kept_K[j]),
            more=tuple(number(values[j].item()) for values in groups.more.values()),
            strips=inside.get(j, ()),
            name=plain(groups.names[j], 60) if groups.names else ", ".join(names.words[j]) if names else "",
            row=int(names.row_K[j]) if names else -1,
        )
        for j in chosen
    )


def _purpose(method: str) -> str:
    """Return the first line of a method's docstring."""
    from thresher.pruning.registry import METHODS

    cls: Any = Audit if method == Audit.name else METHODS.all().get(method)
    return str(cls.__doc__ or "").strip().split("\n")[0] if cls is not None else _PURPOSES.get(method, "")
