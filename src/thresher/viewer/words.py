"""Names of clusters, and the share kept of values and words, as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from thresher.explore.names import ClusterNames, cluster_names
from thresher.explore.shares import Share, kept_shares
from thresher.report.facts import plain
from thresher.viewer.answers import finite
from thresher.viewer.subject import Cut, Subject

_VALUE = 120  # characters of a value


def names_of(
    subject: Subject, number: int, step: int | None, clusters: int | None = None
) -> tuple[list[str], list[int]]:
    """Return the words that set each cluster of a step apart, and its most typical row; ([], []) without clusters.

    The words are "" for a cluster without any, and the row is -1 for an empty cluster. Give the number of clusters if
    the last ones may be empty.
    """
    labels_N = subject.labels(number, step)
    if labels_N is None:
        return [], []

    def made() -> ClusterNames:
        return cluster_names(subject.store(), np.asarray(labels_N), clusters=clusters)

    found = subject.kept.get(("names", number, step, clusters), made)
    return [plain(", ".join(words), 80) for words in found.words], found.row_K.tolist()


def lost_of(subject: Subject, number: int, cut: Cut | None) -> dict[str, Any]:
    """Return the share kept of every value of the metadata and of the captions with every word."""

    def made() -> dict[str, Any]:
        found = kept_shares(subject.store(), subject.selection(number, cut).mask())
        columns = [
            {
                "name": column.name,
                "kind": column.kind,
                "rows": column.rows,
                "kept": column.kept,
                "others": column.others,
                "values": [_value(share) for share in column.values],
            }
            for column in found.columns
        ]
        return {"columns": columns, "left_out": {name: plain(why, 120) for name, why in found.left_out.items()}}

    return subject.kept.get(("lost", number, cut), made)


def _value(share: Share) -> dict[str, Any]:
    """Return a share as JSON values; a range that reaches to infinity has no ends."""
    return {
        **asdict(share),
        "value": None if share.value is None else plain(share.value, _VALUE),
        "at_least": finite(share.at_least),
        "at_most": finite(share.at_most),
    }
