"""The report on a selection: what was kept and dropped, and why, as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thresher import __version__
from thresher.errors import UsageError
from thresher.explore.shares import KeptShares, kept_shares
from thresher.pool.store import EmbeddingStore, same_pool
from thresher.pruning.covariance import CovarianceError
from thresher.report import figures
from thresher.report.examples import Example, look_up, look_up_repeated, with_vectors
from thresher.report.facts import in_short, judged, legible, plain, seeds
from thresher.report.pages import Entry, rendered, write_page
from thresher.report.sample_map import POINTS, SampleMap, sample_map
from thresher.report.views import CovarianceView, StepView, labels_of
from thresher.runtime.cache import Cache
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say
from thresher.selection import Selection


def write_report(
    selection: Selection,
    target: Name,
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 6,
    cells: int = 6,
    points: int = POINTS,
    cache: Cache | None = None,
    covariance: CovarianceError | None = None,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write a report on a selection as one HTML file and return its path.

    The page is self-contained, with charts and images inside, and can be read without scripts and on paper. The same
    selection gives the same bytes, except for images of a reference, which are included only if it can still be opened
    and has not changed, and for the last digits of positions on the map, which depend on the machine.

    Args:
        selection: The selection.
        target: The file; replaced atomically.
        store: The pool of the selection, for captions, images, names of clusters, the shares kept by metadata and the
            map; without it, the report has only numbers.
        title: Heading; by default it names the pool.
        examples: Example rows shown side by side; 0 for none.
        cells: Number of most pruned and of least pruned clusters to list.
        points: Rows on the map; 0 for no map.
        cache: Where the positions on the map are kept (default: the usual cache folder).
        covariance: Result of :func:`thresher.pruning.covariance.covariance_errors` for the selection.
        overwrite: Replace a different file.
        say: Called with one line if the file has this content already, and with one if vectors of the pool cannot be
            read, for which the page then has no map and no typical rows of clusters, and says why.

    Raises:
        UsageError: The store is not the pool of the selection, or a number is negative.
        PoolError: The selection or the metadata of the pool is damaged.
        OutputError: A different file exists and ``overwrite`` is false, or the file cannot be written.
    """
    if min(examples, cells, points) < 0:
        raise UsageError(f"examples = {examples}, cells = {cells}, points = {points}: must be 0 or more")
    if store is not None:
        same_pool(selection, store)
    (views, drawn), unread = with_vectors(store, lambda one: _seen(selection, one, examples, cells, points, cache), say)
    wanted = {row for view in views for row in view.rows()}
    shown = look_up(store, wanted) if store is not None else {}
    others = {
        view.anchor: look_up_repeated(view.step, view.repeats, store.options)
        for view in views
        if store is not None and view.repeats is not None
    }
    about = CovarianceView.of(covariance, cells) if covariance is not None else None
    whole = None if store is None else replace(store, rows=None)
    extra = _Extra(
        shares=None
        if whole is None or len(selection) in (0, selection.total)
        else kept_shares(whole, selection.mask()),
        map=drawn,
        unread=unread,
        paired=store is not None and "joint" in store.fields,
    )
    page = _render(selection, views, shown, others, title or f"Selection from {_name(selection.pool)}", about, extra)
    if store is not None:
        store.check_unchanged("the report was made")
    return write_page(page, target, overwrite=overwrite, say=say)


@dataclass(frozen=True)
class _Extra:
    """What the page shows besides steps."""

    shares: KeptShares | None
    map: SampleMap | None
    unread: str
    paired: bool


def _seen(
    selection: Selection, store: EmbeddingStore | None, examples: int, cells: int, points: int, cache: Cache | None
) -> tuple[list[StepView], SampleMap | None]:
    """Return what is shown of each step, and the map: the parts of the page that may read vectors."""
    views: list[StepView] = []
    clustered = None  # the step that clustered the most rows: its clusters are named on the map
    for step in judged(selection):
        views.append(StepView.of(step, examples if store is not None else 0, cells, store))
        named = views[-1].names
        if named is not None and (clustered is None or step.step.rows_in > np.count_nonzero(clustered[0] >= 0)):
            clustered = labels_of(step), named
    if store is None:
        return views, None
    return views, sample_map(selection, replace(store, rows=None), cache or Cache.at(), points, *(clustered or ()))


def _name(pool: str) -> str:
    return plain(pool.rstrip("/").rsplit("/", 1)[-1], 80) or plain(pool, 80)


def _render(
    selection: Selection,
    views: Sequence[StepView],
    shown: Mapping[int, Example],
    others: Mapping[str, tuple[Mapping[int, Example], bool]],
    title: str,
    covariance: CovarianceView | None,
    extra: _Extra,
) -> str:
    from markupsafe import Markup

    header = selection.header()
    uses = selection.repeats
    examples = [*shown.values(), *(example for rows, _ in others.values() for example in rows.values())]
    return rendered(
        "page.html.jinja",
        title=plain(title, 200),
        selection=selection,
        kept=header["kept"],
        total=header["rows"],
        uses=None if uses is None else int(uses[selection.mask()].sum(dtype="int64")),
        chain=[in_short(step) for step in header["steps"]],
        views=views,
        shown=shown,
        others=others,
        pictures=any(example.picture for example in examples),
        covariance=covariance,
        paired=extra.paired,
        shares=extra.shares,
        map=extra.map,
        unread=extra.unread,
        contents=_contents(views, covariance, extra),
        illustrated=any(example.picture or example.caption for example in shown.values()),
        # Markup is safe: matplotlib escapes all text in a chart.
        funnel=Markup(figures.funnel(selection)) if views else "",
        charts=[{name: Markup(svg) for name, svg in view.charts.items()} for view in views],
        version=__version__,
        selected_by=", ".join(sorted({step.version for step in selection.steps})) or __version__,
        seeds=sorted(seeds(header["steps"])),
        options={name: value for name, value in selection.options.items() if value not in (None, False)},
        header=json.dumps(
            {**header, "steps": [*map(legible, header["steps"])]}, indent=2, ensure_ascii=False, default=str
        ),
    )


def _contents(views: Sequence[StepView], covariance: CovarianceView | None, extra: _Extra) -> list[Entry]:
    """Return the entries of the table of contents."""
    entries = [Entry("funnel", "From pool to selection")]
    if extra.map is not None or extra.unread:
        entries.append(Entry("map", "Map"))
    if extra.shares is not None and extra.shares.columns:
        entries.append(Entry("lost", "What was lost"))
    entries += [Entry(view.anchor, f"{view.number}. {view.step.method}") for view in views]
    if covariance is not None:
        entries.append(Entry("covariance", "Cross-covariance"))
    return [*entries, Entry("reasons", "Why rows were dropped"), Entry("provenance", "Provenance")]
