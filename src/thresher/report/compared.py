"""The report on several selections of one pool: what they share, and what only one of them keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher import __version__
from thresher.errors import UsageError
from thresher.explore.names import ClusterNames, cluster_names
from thresher.explore.shares import KeptShares, Share, kept_shares
from thresher.pool.store import EmbeddingStore, same_pool
from thresher.pruning.covariance import CovarianceError, Deviation
from thresher.report.compare import Comparison, clusters_of, compare
from thresher.report.examples import Example, look_up, with_vectors
from thresher.report.facts import Strip, Tile, in_short, plain
from thresher.report.pages import Entry, rendered, write_page
from thresher.runtime.format import counted
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say
from thresher.selection import Selection

MOST = 5  # selections that fit on a page
_VALUES = 24
_CAPTIONS = 200_000  # whose words are counted, for each selection
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Column:
    """A selection as the page shows it; ``letter`` is its short name in tables."""

    letter: str
    name: str
    location: str
    kept: int
    uses: int
    steps: tuple[str, ...]
    alone: int
    strip: Strip


@dataclass(frozen=True)
class _Group:
    """A cluster, or a value of the metadata: its rows and the share that each selection keeps of them."""

    column: str
    value: str | None
    rows: int
    kept: tuple[int, ...]
    row: int = -1

    @property
    def shares(self) -> tuple[float, ...]:
        """The share that each selection keeps."""
        return tuple(kept / self.rows for kept in self.kept)


def write_comparison(
    selections: Mapping[str, Selection],
    target: Name,
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 12,
    cells: int = 12,
    covariance: Mapping[str, CovarianceError] | None = None,
    labels_N: npt.NDArray[Any] | None = None,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write a report that compares selections of one pool as one HTML file and return its path.

    The page is self-contained. The same selections give the same bytes.

    Args:
        selections: Name -> selection, two to five.
        target: The file; replaced atomically.
        store: The pool, for captions, images, names of clusters and differences by metadata.
        title: Heading; by default it names the pool.
        examples: Example rows of each selection that no other one keeps; 0 for none.
        cells: Number of clusters to list.
        covariance: Results of :func:`thresher.pruning.covariance.covariance_errors`, by name.
        labels_N: (N,) clusters, -1 for none (default: those of the step that clustered the most rows).
        overwrite: Replace a different file.
        say: Called with one line if the file has this content already, and with one if vectors of the pool cannot be
            read, for which the page then has no typical rows of clusters, and says why.

    Raises:
        UsageError: Fewer than two or more than five selections, of different pools, or not of this store.
        PoolError: A selection or the pool is damaged.
        OutputError: A different file exists and ``overwrite`` is false, or the file cannot be written.
    """
    if not 2 <= len(selections) <= MOST:
        raise UsageError(f"{counted(len(selections), 'selection')} to compare; give 2 to {MOST}")
    if examples < 0 or cells < 0:
        raise UsageError(f"examples = {examples}, cells = {cells}: must be 0 or more")
    chosen = list(selections.values())
    if store is not None:
        for selection in chosen:
            same_pool(selection, store)
    whole = None if store is None else replace(store, rows=None)
    labels_N = clusters_of(chosen) if labels_N is None else labels_N
    overlap = compare(selections, labels_N, 0)
    masks = np.stack([selection.mask() for selection in chosen])
    times = masks.sum(axis=0)
    columns = []
    names = list(selections)
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    short = last if len({*last}) == len(last) else names
    for i, selection in enumerate(chosen):
        alone = np.flatnonzero(masks[i] & (times == 1))
        some = alone[np.linspace(0, len(alone) - 1, min(examples, len(alone))).round().astype(np.int64)]
        strip = Strip(f"Only in {chr(65 + i)}", True, tuple(Tile(row, None) for row in some.tolist()))
        steps = tuple(in_short(step) for step in selection.header()["steps"])
        columns.append(
            _Column(chr(65 + i), short[i], names[i], len(selection), selection.uses, steps, len(alone), strip)
        )
    (groups, titles), unread = with_vectors(whole, lambda one: _clusters(masks, labels_N, one, cells), say)
    values, left_out = _values(masks, whole)
    wanted = [tile.row for column in columns for tile in column.strip.tiles] if whole is not None else []
    wanted += [group.row for group in groups if group.row >= 0]
    shown: Mapping[int, Example] = look_up(whole, wanted) if whole is not None else {}
    pool = chosen[0].pool.rstrip("/").rsplit("/", 1)[-1]
    page = rendered(
        "compared.html.jinja",
        title=plain(title or f"{len(chosen)} selections from {plain(pool, 80)}", 200),
        pool=chosen[0].pool,
        total=chosen[0].total,
        fingerprint=chosen[0].store,
        columns=columns,
        repeat=any(column.uses != column.kept for column in columns),
        matrix=_matrix(names, overlap),
        all_keep=int(np.count_nonzero(times == len(chosen))),
        none_keeps=int(np.count_nonzero(times == 0)),
        groups=groups,
        named=titles is not None,
        unread=unread,
        values=values,
        left_out=left_out,
        covariance=_covariance(selections, covariance),
        shown=shown if examples else {},
        pictures=any(example.picture for example in shown.values()),
        contents=_contents(groups, values, covariance),
        version=__version__,
    )
    if store is not None:
        store.check_unchanged("the report was made")
    return write_page(page, target, overwrite=overwrite, say=say)


def _matrix(names: Sequence[str], overlap: Comparison) -> list[list[tuple[int, float]]]:
    """Return for each two selections the rows that both keep, and these as a share of the rows of the first one."""
    both = {(pair["a"], pair["b"]): pair["both"] for pair in overlap["pairs"]}
    both |= {(b, a): count for (a, b), count in both.items()} | {(name, name): overlap["kept"][name] for name in names}
    return [[(both[a, b], both[a, b] / max(overlap["kept"][a], 1)) for b in names] for a in names]


def _clusters(
    masks: npt.NDArray[np.bool_], labels_N: npt.NDArray[Any] | None, store: EmbeddingStore | None, cells: int
) -> tuple[list[_Group], ClusterNames | None]:
    """Return the clusters whose shares kept differ most, relative to what each selection keeps of the pool."""
    if labels_N is None or not cells:
        return [], None
    inside = labels_N >= 0
    sizes = np.bincount(labels_N[inside])
    kept = np.stack([np.bincount(labels_N[inside & mask], minlength=len(sizes)) for mask in masks])
    order = np.argsort(-_spread(kept, sizes, masks), kind="stable")
    order = order[sizes[order] > 0][:cells]
    names = None if store is None else cluster_names(store, labels_N, clusters=len(sizes))
    return [
        _Group(
            str(j),
            ", ".join(names.words[j]) if names is not None else "",
            int(sizes[j]),
            tuple(map(int, kept[:, j])),
            int(names.row_K[j]) if names is not None else -1,
        )
        for j in order.tolist()
    ], names


def _spread(kept: Ints, sizes: Ints, masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return how much the shares kept differ, in units of what each selection keeps of the pool."""
    overall = np.maximum(masks.mean(axis=1), 1e-12)
    relative = kept / np.maximum(sizes, 1) / overall[:, None]
    return np.asarray(relative.max(axis=0) - relative.min(axis=0), np.float64)


def _values(masks: npt.NDArray[np.bool_], store: EmbeddingStore | None) -> tuple[list[_Group], dict[str, str]]:
    """Return the values of the metadata whose shares kept differ most; only those that differ surely from the pool."""
    if store is None:
        return [], {}
    found: list[KeptShares] = [kept_shares(store, mask, captions=_CAPTIONS) for mask in masks]
    by: list[dict[tuple[str, str | None], Share]] = [
        {(column.name, share.value): share for column in one.columns for share in column.values} for one in found
    ]
    common = [key for key in by[0] if all(key in other for other in by) and any(other[key].differs for other in by)]
    if not common:
        return [], dict(found[0].left_out)
    rows = np.array([by[0][key].rows for key in common])
    kept = np.array([[one[key].kept for key in common] for one in by])
    # By what is sure of the differences: of a value with few rows, the shares kept may differ much by chance.
    overall = np.maximum(masks.mean(axis=1), 1e-12)
    sure = np.array([[one[key].shift for key in common] for one in by]) / overall[:, None]
    order = np.argsort(sure.min(axis=0) - sure.max(axis=0), kind="stable")[:_VALUES]
    groups = [_Group(common[i][0], common[i][1], int(rows[i]), tuple(map(int, kept[:, i]))) for i in order.tolist()]
    return groups, dict(found[0].left_out)


def _covariance(
    selections: Mapping[str, Selection], errors: Mapping[str, CovarianceError] | None
) -> list[tuple[str, list[Deviation | None]]]:
    """Return the table of errors: name of the error, and the error of each selection."""
    if errors is None:
        return []
    kinds = {
        "overall": "overall",
        "within clusters": "within",
        "overall, not centred": "overall_uncentred",
        "within clusters, not centred": "within_uncentred",
    }
    table = [(name, [getattr(errors[key], kind) for key in selections]) for name, kind in kinds.items()]
    return [(name, found) for name, found in table if any(one is not None for one in found)]


def _contents(groups: Sequence[_Group], values: Sequence[_Group], covariance: object) -> list[Entry]:
    entries = [Entry("overlap", "Overlap"), Entry("only", "Only in one")]
    entries += [Entry("clusters", "Clusters")] * bool(groups)
    entries += [Entry("columns", "Metadata and words")] * bool(values)
    entries += [Entry("covariance", "Cross-covariance")] * (covariance is not None)
    return [*entries, Entry("provenance", "Provenance")]
