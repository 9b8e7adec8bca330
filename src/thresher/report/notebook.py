"""What stores, selections, clusters and other results show in a notebook: HTML with counts, reasons and images.

A page is one ``<div>`` with its styles, light and dark, without scripts and without requests. All text is escaped: it
comes from files of others. A bounded number of rows of the pool is read, and no vectors.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from thresher.errors import ThresherError, UsageError, suggest
from thresher.pool.store import IN_MEMORY, EmbeddingStore, reopen
from thresher.report import facts, figures
from thresher.report.epochs import Epochs
from thresher.report.examples import Example, look_up, look_up_repeated
from thresher.report.facts import Judged, Pair, number, plain
from thresher.report.pages import rendered
from thresher.runtime.format import counted, percent
from thresher.selection import Selection, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from thresher.dynamic.run_folder import Training
    from thresher.pruning.clusters import Groups
    from thresher.pruning.score_table import ScoreTable
    from thresher.report.compare import Comparison

_FOLDERS = re.compile(r"(?<![^\s\"'\[=])/(?:[^/,\"']*/)+")

First: TypeAlias = Literal["borderline", "clear"]

MOST = 200  # rows or pairs of a gallery
_FEW = 6  # rows shown of each part of a page; of pairs, half as many
_STEPS = 4  # steps with examples
_LISTED = 12  # epochs, clusters, steps or columns listed
_EXAMINED = 20_000_000  # rows of the largest pool whose steps are searched for examples without being asked to


# --- pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Rows of cells: texts, or pairs (part, whole) that are drawn as a bar. Without columns, names and values."""

    rows: Sequence[Sequence[Any]]
    columns: Sequence[str] = ()
    texts: Sequence[str] = ()
    heading: str = ""
    about: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class _Tiles:
    """Rows of the pool, each with a text below it."""

    rows: Sequence[tuple[int, str]]
    heading: str = ""
    about: str = ""
    kind: str = "tiles"


@dataclass(frozen=True)
class _Pairs:
    """Dropped rows next to the rows that they repeat; ``others`` are those rows if they are in another pool."""

    pairs: Sequence[Pair]
    heading: str = ""
    about: str = ""
    others: Mapping[int, Example] | None = None
    kind: str = "pairs"


@dataclass(frozen=True)
class _Note:
    text: str
    heading: str = ""
    about: str = ""
    kind: str = "note"


_Block: TypeAlias = _Table | _Tiles | _Pairs | _Note


@dataclass(frozen=True)
class _Page:
    title: str
    about: str = ""
    share: float | None = None
    blocks: Sequence[_Block] = ()
    shown: Mapping[int, Example] = field(default_factory=dict)

    def html(self) -> str:
        others = [
            example for block in self.blocks if isinstance(block, _Pairs) for example in (block.others or {}).values()
        ]
        pictures = any(example.picture for example in (*self.shown.values(), *others))
        return rendered("notebook.html.jinja", page=self, shown=self.shown, pictures=pictures)


class Gallery:
    """Rows with images, captions and reasons, which a notebook shows.

    Attributes:
        html: The gallery as HTML.
    """

    def __init__(self, page: _Page) -> None:
        """Render a page."""
        self._title = " ".join(filter(None, (page.title, page.about)))
        self.html = page.html()

    def __repr__(self) -> str:
        """Return what is shown, in one line."""
        return f"Gallery({self._title})"

    def _repr_html_(self) -> str:
        return self.html


def in_notebook(make: Callable[[Any], str], value: Any) -> str:
    """Return the HTML of a value; if it cannot be made, its repr, because a notebook must not fail on a result."""
    try:
        return make(value)
    except Exception:  # damaged pools, remote file systems and plug-ins raise any kind of error
        return f"<pre>{html.escape(repr(value))}</pre>"


# --- selections -----------------------------------------------------------------------------------


def selection_html(selection: Selection) -> str:
    """Return the rows kept and dropped by each step, and examples of what was dropped and why."""
    kept, total = len(selection), selection.total
    uses = "" if selection.repeats is None else f", {selection.uses:,} with repeats"
    blocks: list[_Block] = []
    if selection.steps:
        blocks.append(_funnel(selection))
    try:
        shown, more = _steps_examples(selection)
        blocks += more
    except ThresherError as error:
        shown = {}
        blocks.append(_Note(f"No examples: {plain(error, 300)}"))
    share = kept / total if total else None
    title = f"{kept:,} of {counted(total, 'row')} kept, {percent(kept, total)}{uses}"
    return _Page(title, name_of(selection.pool), share, blocks, shown).html()


def step_html(step: Step) -> str:
    """Return the counts, parameters, reasons and notes of a step."""
    rows = [("kept", f"{step.rows_out:,} of {counted(step.rows_in, 'row')}, {percent(step.rows_out, step.rows_in)}")]
    if facts.chains_of(step.method, step.parameters):
        rows += [("of", plain(_without_folders(line), 300)) for line in facts.origins(step)]
    else:
        parameters = facts.parameters(step.method, step.parameters)
        rows += [(p.name, plain(_without_folders(p.value), 200)) for p in parameters if not p.usual]
        if usual := [p.name for p in parameters if p.usual]:
            rows.append(("as by default", ", ".join(usual)))
    if step.cut is not None:
        rows.append(("cut", number(step.cut)))
    rows += [("dropped if", plain(facts.worded(reason, step.cut), 200)) for reason in step.reasons]
    rows += [("note", plain(note, 300)) for note in step.notes[:_LISTED]]
    share = step.rows_out / step.rows_in if step.rows_in else None
    return _Page(step.method, plain(step.foreign, 80), share, [_Table(rows)]).html()


def selection_gallery(
    selection: Selection, store: EmbeddingStore, dropped_by: str | int | None, n: int, first: First
) -> Gallery:
    """Return a gallery of dropped rows: see :meth:`thresher.Selection.show`."""
    _check_count(n)
    if first not in ("borderline", "clear"):
        raise UsageError(f'first = {first!r}: give "borderline" or "clear"')
    chosen = _chosen(selection, dropped_by)
    found = [one for one in facts.judged(selection) if one.number in chosen and not one.kept_n.all()]
    each = max(1, n // max(len(found), 1))
    blocks, wanted = _examples_of(found, each, each, first == "borderline", store)
    by = "" if dropped_by is None else f" by {found[0].step.method}" if found else f" by {dropped_by}"
    rows = sum(one.step.rows_in - one.step.rows_out for one in found)
    title = f"{counted(rows, 'row')} dropped{by}"
    return Gallery(_Page(title, name_of(selection.pool), None, blocks, look_up(store, wanted)))


def plotted(selection: Selection, step: str | int | None) -> Figure:
    """Return a figure: see :meth:`thresher.Selection.plot`."""
    if step is None:
        return figures.funnel_drawing(selection).figure()
    number = min(_chosen(selection, step, "step"))
    one = next(one for one in facts.judged(selection) if one.number == number)
    histogram = facts.histogram(one)
    if histogram is None:
        raise UsageError(f"step = {plain(repr(step), 80)}: {one.step.method} records no scores to plot")
    label = plain(one.step.score, 60) or "score"
    return figures.scores_drawing("scores", histogram, label, one.step.cut).figure()


def _chosen(selection: Selection, dropped_by: str | int | None, argument: str = "dropped_by") -> set[int]:
    """Return the numbers, from 0, of the steps that a user means."""
    methods = [step.method for step in selection.steps]
    if dropped_by is None:
        return set(range(len(methods)))
    if isinstance(dropped_by, int) and not isinstance(dropped_by, bool) and 1 <= dropped_by <= len(methods):
        return {dropped_by - 1}
    named = {i for i, method in enumerate(methods) if method == dropped_by}
    if not named:
        steps = ", ".join(f"{i} ({method})" for i, method in enumerate(methods, 1)) or "none"
        hint = suggest(dropped_by, methods) if isinstance(dropped_by, str) else ""
        raise UsageError(f"{argument} = {plain(repr(dropped_by), 80)}: no such step; there are {steps}.{hint}")
    return named


def _funnel(selection: Selection) -> _Table:
    rows: list[Sequence[Any]] = []
    steps = selection.steps[-_LISTED:]
    for i, step in enumerate(steps, len(selection.steps) - len(steps) + 1):
        because = [facts.worded(reason, step.cut) for reason in step.reasons]
        if selection.total <= _EXAMINED:  # only those that dropped a row
            found = facts.reasons(facts.judge(selection, i - 1))
            because = [one.words if len(found) == 1 else f"{one.words} ({one.count:,})" for one in found]
        rows.append(
            (
                f"{i}. {plain(_without_folders(facts.in_short(step.header())), 80)}",
                f"{step.rows_in:,}",
                f"{step.rows_out:,}",
                (step.rows_out, step.rows_in),
                f"{step.rows_in - step.rows_out:,}",
                "; ".join(plain(reason, 90) for reason in because[:3]),
            )  # fmt: skip
        )
    left_out = len(selection.steps) - len(steps)
    heading = f"The last {len(steps)} of {len(selection.steps)} steps" if left_out else ""
    return _Table(
        rows, ("step", "rows", "kept", "share kept", "dropped", "because"), ("share kept", "because"), heading
    )


def _steps_examples(selection: Selection) -> tuple[Mapping[int, Example], list[_Block]]:
    """Return a few examples of what the last steps dropped, and their rows."""
    if selection.total > _EXAMINED:
        return {}, [_Note("Examples of this many rows only on request: show() has them.")]
    found = [one for one in facts.judged(selection) if not one.kept_n.all()][-_STEPS:]
    try:
        store = selection.source.store if selection.source is not None else _if_local(selection)
        blocks, wanted = _examples_of(found, _FEW, _FEW // 2, True, store)
        if store is None:
            return {}, []
        examples = look_up(store, wanted)
        store.check_unchanged("its rows were read")
        return examples, blocks
    except (ThresherError, OSError) as error:
        return {}, [_Note(f"No captions and images: {plain(error, 300)}")]


def _if_local(selection: Selection) -> EmbeddingStore | None:
    """Open the pool of a loaded selection if that needs no network."""
    return None if "://" in selection.pool and not selection.pool.startswith(IN_MEMORY) else reopen(selection)


def _examples_of(
    found: Sequence[Judged], count: int, paired: int, borderline: bool, store: EmbeddingStore | None
) -> tuple[list[_Block], set[int]]:
    """Return ``count`` rows or ``paired`` pairs that each step dropped, and the rows of the pool to look up."""
    alike = "the least alike first" if borderline else "the most alike first"
    blocks: list[_Block] = []
    wanted: set[int] = set()
    for one in found:
        step, heading = one.step, f"Dropped by {one.number + 1}. {one.step.method}"
        about = counted(step.rows_in - step.rows_out, "row")
        pairs = _sorted([pair for part in facts.pairs(one, paired) for pair in part], paired, borderline)
        again = facts.repeats(one, paired)
        repeated = _sorted((*again.near, *again.far), paired, borderline) if again is not None else []
        if pairs:
            blocks.append(_Pairs(pairs, heading, f"{about}, next to the rows that they repeat, {alike}"))
            wanted |= {row for pair in pairs for row in (pair.row, pair.of)}
        if again is not None and repeated and store is not None:
            others, _ = look_up_repeated(step, again, store.options)
            blocks.append(
                _Pairs(
                    repeated, heading, f"{counted(again.count, 'row')}, next to rows of the reference, {alike}", others
                )
            )
            wanted |= {pair.row for pair in repeated}
        if not pairs and not repeated:
            positions = facts.dropped(one, count, borderline)
            ids, why = one.ids(positions).tolist(), step.why_each(positions)
            tiles = [(row, plain(reason, 120)) for row, reason in zip(ids, why, strict=True)]
            blocks.append(_Tiles(tiles, heading, f"{about}, {_order(step, borderline)}"))
            wanted |= set(ids)
    return blocks, wanted


def _order(step: Step, borderline: bool) -> str:
    if "score" not in step.rows or step.cut is None:
        return "evenly spaced"
    return "those nearest to the cut first" if borderline else "those farthest from the cut first"


def _sorted(pairs: Iterable[Pair], count: int, borderline: bool) -> list[Pair]:
    sign = 1 if borderline else -1
    return sorted(pairs, key=lambda pair: (pair.cosine is None, sign * (pair.cosine or 0), pair.row))[:count]


# --- stores ---------------------------------------------------------------------------------------


def store_html(store: EmbeddingStore) -> str:
    """Return what a store has, and a few of its rows."""
    layout = store.layout
    rows = [("layout", layout.kind)]
    for name, pieces in layout.vectors.items():
        rows.append((f"{name} embeddings", counted(pieces[0].dim, "dimension")))
    rows += [(role, plain(name, 80)) for role, name in (("key", layout.key), ("caption", layout.caption)) if name]
    if layout.image or layout.pictures is not None:
        rows.append(("images", plain(layout.image or "in memory", 80)))
    columns = store.columns
    more = f" and {len(columns) - _LISTED:,} more" if len(columns) > _LISTED else ""
    if columns:
        rows.append(("columns", ", ".join(plain(name, 40) for name in columns[:_LISTED]) + more))
    if store.rows is not None:
        rows.append(("view of", counted(store.total, "row")))
    blocks: list[_Block] = [_Table(rows)]
    shown: Mapping[int, Example] = {}
    if len(store) and _is_near(store):
        try:
            ids = _evenly(store.ids, _FEW)
            shown = look_up(store, ids)
            blocks.append(_Tiles([(row, f"row {row:,}") for row in ids]))
        except (ThresherError, OSError) as error:
            blocks.append(_Note(f"No rows can be shown: {plain(error, 300)}"))
    return _Page(counted(len(store), "row"), name_of(layout.location), None, blocks, shown).html()


def store_gallery(store: EmbeddingStore, rows: Any = None, n: int = 24) -> Gallery:
    """Return a gallery of rows of a store: see :meth:`thresher.EmbeddingStore.show`."""
    _check_count(n)
    ids = _evenly(store.ids, n) if rows is None else _row_ids(store, rows)
    title = f"{len(ids):,} of {counted(len(store), 'row')}"
    tiles = _Tiles([(row, f"row {row:,}") for row in ids])
    return Gallery(_Page(title, name_of(store.layout.location), None, [tiles], look_up(store, ids)))


def _row_ids(store: EmbeddingStore, rows: Any) -> list[int]:
    """Return row ids from a number, numbers, a slice of the ids, or a mask over the whole store."""
    if isinstance(rows, slice):
        given = np.arange(store.total)[rows]
    else:
        try:
            given = np.atleast_1d(np.asarray(rows if hasattr(rows, "__array__") or np.isscalar(rows) else list(rows)))
        except (TypeError, ValueError):
            given = np.empty(0, object)
    if given.dtype == np.bool_ and given.shape == (store.total,):
        given = np.flatnonzero(given)
    if given.ndim != 1 or given.dtype.kind not in "iu" and len(given):
        raise UsageError("rows: give row numbers, a slice, or a mask with a value for each row of the store")
    if len(given) > MOST:
        raise UsageError(f"{len(given):,} rows are too many to show; give at most {MOST}")
    if len(given) and not (0 <= given.min() and given.max() < store.total):
        wrong = next(row for row in given.tolist() if not 0 <= row < store.total)
        raise UsageError(f"no row {wrong:,}; give row numbers from 0 to {store.total - 1:,}")
    return [int(row) for row in given]


# --- clusters, scores, comparisons ----------------------------------------------------------------


def groups_html(groups: Groups) -> str:
    """Return the sizes of clusters, and the rows nearest to the centroids of the largest."""
    sizes = groups.sizes_K
    filled = int(np.count_nonzero(sizes))
    rows = [
        ("clusters", f"{len(sizes):,}" + (f", {len(sizes) - filled:,} of them empty" if filled < len(sizes) else "")),
        ("rows in a cluster", f"{int(sizes.min()):,} to {int(sizes.max()):,}" if len(sizes) else "-"),
        ("mean distance to the centroid", number(float(np.mean(groups.distances_N))) if len(groups.labels_N) else "-"),
        *(("note", plain(note, 300)) for note in groups.notes[:_LISTED]),
    ]  # fmt: skip
    blocks: list[_Block] = [_Table(rows)]
    shown: Mapping[int, Example] = {}
    about = ""
    if groups.store is not None:
        about = name_of(groups.store.layout.location)
        if _is_near(groups.store) and len(groups.labels_N) <= _EXAMINED:
            try:
                shown, more = _nearest_of_each(groups, groups.store, _FEW)
                blocks += more
            except (ThresherError, OSError) as error:
                blocks.append(_Note(f"No rows can be shown: {plain(error, 300)}"))
    return _Page(
        f"{counted(len(sizes), 'cluster')} of {counted(len(groups.labels_N), 'row')}", about, None, blocks, shown
    ).html()


def groups_gallery(groups: Groups, cluster: int | None = None, n: int = 24, pool: Any = None) -> Gallery:
    """Return a gallery of the rows of a cluster: see :meth:`thresher.Groups.show`."""
    _check_count(n)
    store = pool if isinstance(pool, EmbeddingStore) else groups.store
    if store is None:
        raise UsageError("these clusters do not know their pool; give the store that was clustered, with pool=")
    if len(store) != len(groups.labels_N):
        raise UsageError(f"a pool of {counted(len(store), 'row')} for clusters of {len(groups.labels_N):,}")
    about, sizes = name_of(store.layout.location), groups.sizes_K
    if cluster is None:
        shown, blocks = _nearest_of_each(groups, store, max(1, n // 6))
        return Gallery(_Page(f"the largest of {counted(len(sizes), 'cluster')}", about, None, blocks, shown))
    if isinstance(cluster, bool) or not isinstance(cluster, (int, np.integer)) or not 0 <= cluster < len(sizes):
        raise UsageError(f"no cluster {plain(repr(cluster), 40)}; give a number from 0 to {len(sizes) - 1:,}")
    inside = np.flatnonzero(groups.labels_N == cluster)
    inside = inside[np.argsort(groups.distances_N[inside], kind="stable")]
    near = inside[: (n + 1) // 2]
    far = inside[len(near) :][::-1][: n // 2]
    found = [("Nearest to the centroid", near), ("Farthest from it", far)]
    blocks = [_distances(groups, store, rows, heading, "") for heading, rows in found if len(rows)]
    shown = look_up(store, store.ids[np.concatenate([near, far])].tolist())
    return Gallery(_Page(f"cluster {cluster}: {counted(len(inside), 'row')}", about, None, blocks, shown))


def _nearest_of_each(groups: Groups, store: EmbeddingStore, count: int) -> tuple[Mapping[int, Example], list[_Block]]:
    """Return the rows nearest to the centroid of each of the six largest clusters."""
    sizes = groups.sizes_K
    blocks: list[_Block] = []
    wanted: list[int] = []
    for k in np.argsort(-sizes, kind="stable")[:6].tolist():
        inside = np.flatnonzero(groups.labels_N == k)
        rows = inside[np.argsort(groups.distances_N[inside], kind="stable")[:count]]
        if len(rows):
            blocks.append(_distances(groups, store, rows, f"Cluster {k}", counted(len(inside), "row")))
            wanted += store.ids[rows].tolist()
    return look_up(store, wanted), blocks


def _distances(groups: Groups, store: EmbeddingStore, rows: Any, heading: str, about: str) -> _Tiles:
    ids, distances = store.ids[rows].tolist(), groups.distances_N[rows].tolist()
    return _Tiles([(i, f"distance {d:.3f}") for i, d in zip(ids, distances, strict=True)], heading, about)


def scores_html(table: ScoreTable) -> str:
    """Return quantiles of scores, and the rows with the highest and the lowest."""
    values = np.asarray(table.values_n)
    usable = np.flatnonzero(np.isfinite(values))
    of = int(table.info.get("of", len(values)))
    blocks: list[_Block] = []
    shown: Mapping[int, Example] = {}
    if len(usable):
        shares = {"lowest": 0, "1%": 1, "25%": 25, "median": 50, "75%": 75, "99%": 99, "highest": 100}
        found = np.percentile(values[usable].astype(np.float64), list(shares.values()))
        blocks.append(_Table([["score", *map(number, found.tolist())]], ["", *shares]))
    if len(usable) < len(values):
        blocks.append(_Note(f"{counted(len(values) - len(usable), 'row')} without a usable score."))
    blocks += [_Note(plain(note, 300)) for note in table.info.get("notes", ())[:_LISTED]]
    if table.store is not None and len(usable) and _is_near(table.store):
        order = usable[np.argsort(-values[usable], kind="stable")]
        ends = {"Highest scores": order[:_FEW], "Lowest scores": order[_FEW:][::-1][:_FEW]}
        try:
            shown = look_up(table.store, table.ids_n[np.concatenate(list(ends.values()))].tolist())
            for heading, rows in ends.items():
                tiles = [(int(table.ids_n[i]), number(values[i].item())) for i in rows.tolist()]
                blocks += [_Tiles(tiles, heading)] if tiles else []
        except (ThresherError, OSError) as error:
            blocks.append(_Note(f"No rows can be shown: {plain(error, 300)}"))
    title = f"{plain(table.info.get('method', 'score'), 80)}: {len(values):,} of {counted(of, 'row')}"
    return _Page(title, name_of(str(table.info.get("pool", ""))), None, blocks, shown).html()


def comparison_html(comparison: Comparison) -> str:
    """Return what selections keep, what pairs of them have in common, and the clusters where they differ most."""
    rows, kept = comparison["rows"], comparison["kept"]
    blocks: list[_Block] = [
        _Table(
            [(plain(name, 80), f"{count:,}", (count, rows)) for name, count in kept.items()],
            ("selection", "rows kept", "share of the pool"),
            ("share of the pool",),
        )
    ]
    if comparison["pairs"]:
        columns = ("selections", "in both", "only in the first", "only in the second", "overlap", "Jaccard")
        pairs = [
            (
                f"{plain(pair['a'], 60)} and {plain(pair['b'], 60)}",
                f"{pair['both']:,}",
                f"{pair['only_a']:,}",
                f"{pair['only_b']:,}",
                percent(pair["overlap"]),
                f"{pair['jaccard']:.3f}",
            )  # fmt: skip
            for pair in comparison["pairs"][:MOST]
        ]
        blocks.append(_Table(pairs, columns))
    if comparison["clusters"]:
        cells = [
            (str(one["cluster"]), f"{one['size']:,}", *((one["kept"][name], one["size"]) for name in kept))
            for one in comparison["clusters"][:_LISTED]
        ]
        names = ("cluster", "rows", *(f"kept by {plain(name, 60)}" for name in kept))
        blocks.append(_Table(cells, names, names[2:], "Clusters where they differ most"))
    return _Page(f"{counted(len(kept), 'selection')} of {counted(rows, 'row')}", "", None, blocks).html()


# --- training runs --------------------------------------------------------------------------------


def training_html(training: Training) -> str:
    """Return the main numbers of a training run and its last epochs."""
    from thresher.report.run import COLUMNS, epoch_table, has_values, main_facts

    log = training.log()
    epochs = Epochs.of(log)
    blocks: list[_Block] = [_Table([(name, plain(value, 200)) for name, value in main_facts(training, epochs)])]
    if unfinished := training.unfinished(log):
        blocks.append(_Note(f"Not finished: {unfinished}."))
    if len(epochs):
        titles = [title for name, title in COLUMNS.items() if has_values(epochs, name)]
        lines = [(str(n), phase, *cells) for n, phase, cells in epoch_table(epochs)[-_LISTED:]]
        more = f"the last {len(lines)} of {len(epochs):,}" if len(lines) < len(epochs) else ""
        blocks.append(_Table(lines, ("epoch", "phase", *titles), ("phase",), "Epochs", more))
        results = [
            (f"{plain(name, 60)}: {plain(curve.metric, 60)}", number(curve.values[-1]))
            for name, measured in epochs.evals.items()
            for curve in measured
        ]
        if results:
            blocks.append(_Table(results[:_LISTED], heading="Evaluation", about="after the last epoch"))
    about = f"on {counted(training.rows, 'row')} of {name_of(training.data)}"
    return _Page(f"{plain(training.task, 20)} training run", about, None, blocks).html()


# --- small things ---------------------------------------------------------------------------------


def name_of(location: str) -> str:
    """Return the last part of the location of a pool: a notebook that is shared should not name folders."""
    if location.startswith(IN_MEMORY):
        return "data in memory"
    return plain(location.rstrip("/").rsplit("/", 1)[-1], 80)


def _without_folders(text: str) -> str:
    """Return parameters without the folders of absolute paths."""
    return _FOLDERS.sub(f"{facts.ELLIPSIS}/", text)


def _is_near(store: EmbeddingStore) -> bool:
    """Return whether rows can be looked up without a network."""
    return all(table.protocol == "file" for table in store.layout.tables)


def _evenly(ids: Any, count: int) -> list[int]:
    """Return ``count`` of some ids, evenly spaced."""
    return [int(i) for i in ids[np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(np.int64))]]


def _check_count(n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MOST:
        raise UsageError(f"n = {plain(repr(n), 40)}: give a number from 1 to {MOST}")
