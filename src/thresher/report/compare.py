"""Compare selections: overlap, Jaccard index, and differences by cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.io.paths import visible
from thresher.runtime.format import counted
from thresher.selection import Selection


class Comparison(dict[str, Any]):
    """What selections have in common: the dictionary of :func:`compare`, which a notebook shows as tables."""

    def __repr__(self) -> str:
        """Return the number of rows that each selection keeps."""
        kept = ", ".join(f"{visible(name, 60)} {count:,}" for name, count in list(self["kept"].items())[:6])
        return f"Comparison({counted(len(self['kept']), 'selection')} of {counted(self['rows'], 'row')}: {kept})"

    def _repr_html_(self) -> str:
        from thresher.report.notebook import comparison_html, in_notebook

        return in_notebook(comparison_html, self)


def compare(
    selections: Mapping[str, Selection], labels_N: npt.NDArray[Any] | None = None, worst: int = 10
) -> Comparison:
    """Compare selections of one pool.

    Args:
        selections: Name -> selection, of the same store.
        labels_N: Cluster of every row, as ``thresher cluster`` writes them, -1 for rows in no cluster; by default those
            of the step, in any of the selections, that clustered the most rows.
        worst: How many clusters to list, largest differences first.

    Returns:
        "rows", "kept" and "uses" (repeats counted) by name, "pairs" (rows in both, overlap as a share of the
        smaller, Jaccard) and "clusters" (size and kept by name, those with the largest spread of kept shares
        first; none for a single selection).

    Raises:
        UsageError: No selections, or selections of different pools.
    """
    if not selections:
        raise UsageError("nothing to compare; give at least one selection")
    first = next(iter(selections.values()))
    masks = {}
    for name, selection in selections.items():
        masks[name] = first.same_store(selection).mask()
    names = list(selections)
    pairs = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = int(np.count_nonzero(masks[a] & masks[b]))
            either = int(np.count_nonzero(masks[a] | masks[b]))
            smaller = min(len(selections[a]), len(selections[b]))
            pairs.append(
                {
                    "a": a,
                    "b": b,
                    "both": both,
                    "only_a": len(selections[a]) - both,
                    "only_b": len(selections[b]) - both,
                    "overlap": both / smaller if smaller else 0.0,
                    "jaccard": both / either if either else 0.0,
                }
            )
    if labels_N is None:
        labels_N = clusters_of(list(selections.values()))
    elif len(labels_N) != first.total:
        raise UsageError(f"{len(labels_N):,} labels for a pool of {first.total:,} rows")
    result = Comparison(
        rows=first.total,
        kept={name: len(selection) for name, selection in selections.items()},
        uses={name: selection.uses for name, selection in selections.items()},
        pairs=pairs,
        clusters=[],
    )
    if labels_N is not None and len(selections) > 1:
        result["clusters"] = _by_cluster(masks, labels_N, worst)
    return result


def clusters_of(selections: list[Selection]) -> npt.NDArray[np.int32] | None:
    """Return the labels of the step that clustered the most rows, -1 for other rows; None if no step has clusters."""
    best: tuple[int, Selection, int] | None = None
    for selection in selections:
        for number, step in enumerate(selection.steps):
            if "cluster" in step.rows and (best is None or step.rows_in > best[0]):
                best = step.rows_in, selection, number
    if best is None:
        return None
    _, selection, number = best
    labels = np.full(selection.total, -1, np.int32)
    labels[selection.given(number)] = selection.steps[number].rows["cluster"]
    return labels


def _by_cluster(
    masks: Mapping[str, npt.NDArray[np.bool_]], labels_N: npt.NDArray[Any], worst: int
) -> list[dict[str, Any]]:
    inside = labels_N >= 0
    sizes = np.bincount(labels_N[inside])
    kept = {name: np.bincount(labels_N[inside & mask], minlength=len(sizes)) for name, mask in masks.items()}
    shares = np.stack([counts / np.maximum(sizes, 1) for counts in kept.values()])
    order = np.argsort(-(shares.max(axis=0) - shares.min(axis=0)), kind="stable")
    order = order[sizes[order] > 0][:worst]
    return [
        {"cluster": int(j), "size": int(sizes[j]), "kept": {name: int(counts[j]) for name, counts in kept.items()}}
        for j in order
    ]
