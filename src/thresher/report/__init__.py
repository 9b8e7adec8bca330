"""The report: what was kept, what went and why, on one page that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thresher import __version__
from thresher.errors import UsageError
from thresher.pool.store import EmbeddingStore, same_pool
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
    clusters,
    extremes,
    histogram,
    in_clusters,
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
    told_in_short,
)
from thresher.report.pages import rendered
from thresher.runtime.files import writing
from thresher.runtime.format import percent
from thresher.select.audit import Audit
from thresher.select.covariance import CovarianceError, Deviation
from thresher.selection import Selection, Step

_PURPOSES = {"coreset": "Keep the rows that a training run could least have done without."}  # of what is no method
_EARLIER, _TO_REFERENCE = "cosine to the nearest earlier row", "cosine to the nearest row of the reference"
_LABELS = {"d_intra": "d_intra (spread)", "d_inter": "d_inter (distance to others)"}


def write_report(
    selection: Selection,
    target: str | os.PathLike[str],
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 6,
    cells: int = 6,
    covariance: CovarianceError | None = None,
) -> Path:
    """Write a selection's story as one HTML file and return its path.

    The page loads nothing: charts and pictures are inside it. The same selection gives the same bytes, but for the
    pictures of a reference, which are there as long as it can be opened and is unchanged.

    Args:
        selection: What to tell about.
        target: The file; replaced as a whole or not at all.
        store: The selection's pool, for captions and pictures; without it there are only numbers.
        title: Heading; the pool's name by default.
        examples: Rows shown side by side; 0 shows none.
        cells: Clusters listed at either end, the most and the least pruned.
        covariance: What :func:`thresher.select.covariance.covariance_errors` found for the selection.

    Raises:
        UsageError: The store is another pool than the selection's, or a negative number.
        PoolError: The selection or the pool is damaged.
        OutputError: The file cannot be written.
    """
    if examples < 0 or cells < 0:
        raise UsageError(f"examples = {examples}, cells = {cells}: 0 or more")
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
    page = _render(selection, views, shown, others, title or f"What was kept of {_name(selection.pool)}", about, paired)
    with writing(target) as scratch:
        # A path may hold bytes that are no text; the page must not fail for them.
        Path(scratch).write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return Path(target)


@dataclass(frozen=True)
class _Cell:
    """A cluster in the tables; strips of its rows where there is a store."""

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
        """Work out everything about one step that does not need the pool."""
        step, anchor = judged.step, f"step-{judged.number + 1}"
        scored, found = histogram(judged), clusters(judged)
        most, least = extremes(found, cells) if found is not None else ([], [])
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
        if found is not None and found.difficulty:
            charts["shares"] = figures.shares(f"{anchor}-shares", found)
        if found is not None:
            charts["sizes"] = figures.sizes(f"{anchor}-sizes", found)

        return cls(
            number=judged.number + 1,
            step=step,
            anchor=anchor,
            purpose=_purpose(step.method),
            parameters=() if "of" in step.parameters else parameters(step.method, step.parameters),
            origins=origins(step),
            reasons=reasons(judged),
            histogram=scored,
            charts=charts,
            clusters=found,
            columns=tuple(_LABELS.get(name, name.replace("_", " ")) for name in found.more) if found else (),
            most=_cells(found, most, inside),
            least=_cells(found, least, inside),
            near=near,
            far=far,
            repeats=again,
            strips=strips(judged, examples),
        )

    @property
    def set_aside(self) -> bool:
        """Whether this is the audit, not a method."""
        return self.step.method == Audit.name

    def rows(self) -> Iterator[int]:
        """Global ids of all rows shown."""
        inside = [strip for cell in (*self.most, *self.least) for strip in cell.strips]
        for strip in (*self.strips, *inside):
            yield from (tile.row for tile in strip.tiles)
        for pair in (*self.near, *self.far):
            yield from (pair.row, pair.of)
        if self.repeats is not None:
            yield from (pair.row for pair in (*self.repeats.near, *self.repeats.far))


@dataclass(frozen=True)
class _Covariance:
    """The covariance error as the page shows it: lines of a table, and the classes with most of it."""

    error: CovarianceError
    lines: tuple[tuple[str, Deviation], ...]
    worst: tuple[_Cell, ...]

    @classmethod
    def of(cls, error: CovarianceError, cells: int) -> _Covariance:
        """Say in words what each figure is."""
        inside = f"within {error.classes:,} clusters"
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
        return cls(error, tuple((name, found) for name, found in lines.items() if found is not None), worst)


def _cells(found: Clusters | None, chosen: Sequence[int], inside: Mapping[int, tuple[Strip, ...]]) -> tuple[_Cell, ...]:
    if found is None:
        return ()
    return tuple(
        _Cell(
            cluster=j,
            size=int(found.size_K[j]),
            kept=int(found.kept_K[j]),
            more=tuple(number(values[j].item()) for values in found.more.values()),
            strips=inside.get(j, ()),
            name=plain(found.names[j], 60) if found.names else "",
        )
        for j in chosen
    )


def _purpose(method: str) -> str:
    """Say in one line what a method does, from its own docstring."""
    from thresher.select.registry import METHODS

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
    examples = [*shown.values(), *(example for found, _ in others.values() for example in found.values())]
    return rendered(
        "page.html.jinja",
        title=plain(title, 200),
        selection=selection,
        kept=header["kept"],
        total=header["rows"],
        uses=None if uses is None else int(uses[selection.mask()].sum(dtype="int64")),
        chain=[told_in_short(step) for step in header["steps"]],
        views=views,
        shown=shown,
        others=others,
        pictures=any(example.picture for example in examples),
        covariance=covariance,
        paired=paired,
        telling=any(example.picture or example.caption for example in shown.values()),
        # Made here from numbers, with every word in it escaped by the drawing library.
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
