"""The report on a selection: what was kept and dropped, and why, as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thresher import __version__
from thresher.errors import UsageError
from thresher.pool.store import EmbeddingStore, same_pool
from thresher.pruning.audit import Audit
from thresher.pruning.covariance import CovarianceError, Deviation
from thresher.report import figures
from thresher.report.examples import Example, look_up, look_up_repeated
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
    in_short,
    judged,
    legible,
    number,
    origins,
    pairs,
    parameters,
    plain,
    reasons,
    repeats,
    seeds,
    strips,
)
from thresher.report.pages import rendered, write_page
from thresher.runtime.format import counted, percent
from thresher.runtime.places import AnyPath
from thresher.runtime.results import Name, Say
from thresher.selection import Selection, Step

_PURPOSES = {"coreset": "Keep the rows that were least redundant in a training run."}  # steps that are not methods
_EARLIER, _TO_REFERENCE = "cosine to the nearest earlier row", "cosine to the nearest row of the reference"
_LABELS = {"d_intra": "d_intra (spread)", "d_inter": "d_inter (distance to others)"}


def write_report(
    selection: Selection,
    target: Name,
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 6,
    cells: int = 6,
    covariance: CovarianceError | None = None,
    overwrite: bool = True,
    say: Say | None = None,
) -> AnyPath:
    """Write a report on a selection as one HTML file and return its path.

    The page is self-contained, with charts and images inside. The same selection gives the same bytes, except for
    images of a reference, which are included only if it can still be opened and has not changed.

    Args:
        selection: The selection.
        target: The file; replaced atomically.
        store: The pool of the selection, for captions and images; without it, the report has only numbers.
        title: Heading; by default it names the pool.
        examples: Example rows shown side by side; 0 for none.
        cells: Number of most pruned and of least pruned clusters to list.
        covariance: Result of :func:`thresher.pruning.covariance.covariance_errors` for the selection.
        overwrite: Replace a different file.
        say: Called with one line if the file has this content already.

    Raises:
        UsageError: The store is not the pool of the selection, or a number is negative.
        PoolError: The selection or the pool is damaged.
        OutputError: A different file exists and ``overwrite`` is false, or the file cannot be written.
    """
    if examples < 0 or cells < 0:
        raise UsageError(f"examples = {examples}, cells = {cells}: must be 0 or more")
    if store is not None:
        same_pool(selection, store)
    views = tuple(_View.of(step, examples if store is not None else 0, cells) for step in judged(selection))
    wanted = {row for view in views for row in view.rows()}
    shown = look_up(store, wanted) if store is not None else {}
    others = {
        view.anchor: look_up_repeated(view.step, view.repeats, store.options)
        for view in views
        if store is not None and view.repeats is not None
    }
    about = _Covariance.of(covariance, cells) if covariance is not None else None
    paired = store is not None and "joint" in store.fields
    page = _render(selection, views, shown, others, title or f"Selection from {_name(selection.pool)}", about, paired)
    return write_page(page, target, overwrite=overwrite, say=say)


@dataclass(frozen=True)
class _Cell:
    """A cluster in the tables, with strips of its rows if there is a store."""

    cluster: int
    size: int
    kept: int
    more: tuple[str, ...]
    strips: tuple[Strip, ...]
    name: str = ""


@dataclass(frozen=True, eq=False)
class _View:
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
    most: tuple[_Cell, ...]
    least: tuple[_Cell, ...]
    near: tuple[Pair, ...]
    far: tuple[Pair, ...]
    repeats: Repeats | None
    strips: tuple[Strip, ...]

    @classmethod
    def of(cls, judged: Judged, examples: int, cells: int) -> _View:
        """Compute everything about one step that does not need the pool."""
        step, anchor = judged.step, f"step-{judged.number + 1}"
        scored, groups = histogram(judged), clusters(judged)
        most, least = extremes(groups, cells) if groups is not None else ([], [])
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
            most=_cells(groups, most, inside),
            least=_cells(groups, least, inside),
            near=near,
            far=far,
            repeats=again,
            strips=strips(judged, examples),
        )

    @property
    def is_audit(self) -> bool:
        """Whether the step is the audit that skips bad rows, not a method."""
        return self.step.method == Audit.name

    def rows(self) -> Iterator[int]:
        """Yield the global ids of all rows shown."""
        inside = [strip for cell in (*self.most, *self.least) for strip in cell.strips]
        for strip in (*self.strips, *inside):
            yield from (tile.row for tile in strip.tiles)
        for pair in (*self.near, *self.far):
            yield from (pair.row, pair.of)
        if self.repeats is not None:
            yield from (pair.row for pair in (*self.repeats.near, *self.repeats.far))


@dataclass(frozen=True)
class _Covariance:
    """The covariance error as the page shows it: table rows, and the clusters with the largest share."""

    error: CovarianceError
    lines: tuple[tuple[str, Deviation], ...]
    worst: tuple[_Cell, ...]

    @classmethod
    def of(cls, error: CovarianceError, cells: int) -> _Covariance:
        """Name each number."""
        inside = f"within {counted(error.classes, 'cluster')}"
        lines = {
            "overall": error.overall,
            inside: error.within,
            "overall, not centred": error.overall_uncentred,
            f"{inside}, not centred": error.within_uncentred,
        }
        worst = tuple(
            _Cell(entry.label, entry.rows, entry.kept, (number(entry.error), percent(entry.share, 1)), ())
            for entry in error.worst(cells)
        )
        return cls(error, tuple((name, deviation) for name, deviation in lines.items() if deviation is not None), worst)


def _cells(
    groups: Clusters | None, chosen: Sequence[int], inside: Mapping[int, tuple[Strip, ...]]
) -> tuple[_Cell, ...]:
    if groups is None:
        return ()
    return tuple(
        _Cell(
            cluster=j,
            size=int(groups.size_K[j]),
            kept=int(groups.kept_K[j]),
            more=tuple(number(values[j].item()) for values in groups.more.values()),
            strips=inside.get(j, ()),
            name=plain(groups.names[j], 60) if groups.names else "",
        )
        for j in chosen
    )


def _purpose(method: str) -> str:
    """Return the first line of a method's docstring."""
    from thresher.pruning.registry import METHODS

    cls: Any = Audit if method == Audit.name else METHODS.all().get(method)
    return str(cls.__doc__ or "").strip().split("\n")[0] if cls is not None else _PURPOSES.get(method, "")


def _name(pool: str) -> str:
    return plain(pool.rstrip("/").rsplit("/", 1)[-1], 80) or plain(pool, 80)


def _render(
    selection: Selection,
    views: Sequence[_View],
    shown: Mapping[int, Example],
    others: Mapping[str, tuple[Mapping[int, Example], bool]],
    title: str,
    covariance: _Covariance | None,
    paired: bool,
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
        paired=paired,
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
