"""Numbers and texts for the report on a selection: pure functions of its arrays.

Shape letters: N rows of the pool, n rows given to a step, K clusters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import PoolError, UsageError
from thresher.ops.cut import top
from thresher.pruning.audit import Audit
from thresher.pruning.registry import METHODS
from thresher.runtime.template import RoundedFloat, parts_of
from thresher.selection import COMBINED, Selection, Step

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_BINS = 72
_DRAWABLE = 1e100
_SAMPLED = 1_000_000  # maximum number of scores to choose an axis from
ARROW = "\N{RIGHTWARDS ARROW}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_GROUP_ORDER = ("quota", "complexity", "d_intra", "d_inter")


# --- numbers and texts ----------------------------------------------------------------------------


def number(value: Any) -> str:
    """Return a count with thousands separators, or another number with four decimals."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    return f"{RoundedFloat(value):.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def plain(text: Any, limit: int = 0) -> str:
    """Return text on one line, without control and bidirectional characters; cut to ``limit`` with an ellipsis."""
    joiners = "\u200c\u200d"  # parts of words and emoji, although not printable on their own
    text = str(text)[: 8 * limit or None]  # of a very long text only the start is looked at
    line = " ".join("".join(c if c.isprintable() or c in joiners else " " for c in text).split())
    return line if not limit or len(line) <= limit else line[: limit - 1].rstrip() + ELLIPSIS


@dataclass(frozen=True)
class Parameter:
    """A parameter of a step; ``usual`` if it has its default."""

    name: str
    value: str
    help: str
    usual: bool


def parameters(method: str, values: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Return a step's parameters in the method's order, with a mark on those that have their default."""
    cls: Any = Audit if method == Audit.name else _method(method)
    known = {item.name: item for item in fields(cls)} if cls is not None else {}
    ordered = [name for name in known if name in values] + [name for name in values if name not in known]
    rows = []
    for name in ordered:
        value, item = values[name], known.get(name)
        default: Any = MISSING
        if item is not None:
            default = item.default_factory() if item.default_factory is not MISSING else item.default
        usual = value == default or (default is not MISSING and default is not None and value == str(default))
        text = str(item.metadata.get("help", "")) if item is not None else ""
        rows.append(Parameter(name, _value(value), text, usual))
    return tuple(rows)


def _method(name: str) -> Any:
    """Return the class of a method, None if there is none; one of thresher without looking for other packages."""
    with suppress(UsageError):
        return METHODS.find(name)
    return None


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def in_short(head: Mapping[str, Any]) -> str:
    """Return a step's method and its parameters other than defaults, on one line."""
    if chains_of(head["method"], head["parameters"]):
        return str(head["method"])
    chosen = (f"{p.name} = {plain(p.value, 48)}" for p in parameters(head["method"], head["parameters"]) if not p.usual)
    return " ".join([str(head["method"]), ", ".join(chosen)]).strip()


def chains_of(method: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Return the headers of the steps of both selections of a union, intersection or difference, else nothing."""
    return parameters.get("of", ()) if method in COMBINED else ()


def origins(step: Step) -> tuple[str, ...]:
    """Return the step chains of a union, intersection or difference, one line each."""
    chains = chains_of(step.method, step.parameters)
    return tuple(f" {ARROW} ".join(map(_with_counts, chain)) or "every row" for chain in chains)


def _with_counts(head: Mapping[str, Any]) -> str:
    return f"{in_short(head)} ({head['rows_out']:,} of {head['rows_in']:,})"


def seeds(heads: Iterable[Mapping[str, Any]]) -> set[int]:
    """Return the seeds of some steps, including those inside unions, intersections and differences."""
    numbers: set[int] = set()
    for head in heads:
        if chains := chains_of(head["method"], head["parameters"]):
            numbers.update(*(seeds(chain) for chain in chains))
        else:
            numbers.add(int(head["seed"]))
    return numbers


def words(template: str, cut: float | None) -> tuple[tuple[str, bool], ...]:
    """Split a reason's template into pairs (text, whether it is a name to fill in for each row)."""
    parts: list[tuple[str, bool]] = []
    for text, name, spec in parts_of(template):
        if text:
            parts.append((text, False))
        if name == "cut" and cut is not None and not spec.endswith("d"):
            parts.append((format(RoundedFloat(cut), spec), False))
        elif name:
            parts.append((name.replace("_", " "), True))
    return tuple(parts)


def worded(template: str, cut: float | None) -> str:
    """Return a reason's template for many rows, with an ellipsis for each value that differs between rows."""
    return "".join(ELLIPSIS if name else text for text, name in words(template, cut))


def legible(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's header with readable reasons, also for steps inside unions, intersections and differences."""
    readable = dict(head)
    if chains := chains_of(head["method"], head["parameters"]):
        readable["parameters"] = {**head["parameters"], "of": [[legible(step) for step in chain] for chain in chains]}
    return {**readable, "reasons": [worded(reason, head["cut"]) for reason in head["reasons"]]}


# --- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Judged:
    """A step of a selection, and which of its input rows it kept.

    Attributes:
        number: From 0.
        step: The step and its evidence.
        kept_n: (n,) bool over the rows given to the step.
        given_N: (N,) bool over the pool.
        dropped_by: (N,) of the selection.
    """

    number: int
    step: Step
    kept_n: Bools = field(repr=False)
    given_N: Bools = field(repr=False)
    dropped_by: npt.NDArray[np.int16] = field(repr=False)

    def ids(self, positions: Ints) -> Ints:
        """Return the global ids of some of the rows given to the step."""
        if len(self.kept_n) == len(self.given_N):
            return positions
        return np.asarray(np.flatnonzero(self.given_N)[positions], np.int64)


def judged(selection: Selection) -> Iterator[Judged]:
    """Yield the steps one at a time, so that only the arrays of one step are in memory.

    Raises:
        PoolError: The evidence does not match the rows.
    """
    for number in range(len(selection.steps)):
        yield judge(selection, number)


def judge(selection: Selection, number: int) -> Judged:
    """Return one step of a selection, by its number from 0.

    Raises:
        PoolError: The evidence does not match the rows.
    """
    step, dropped_by = selection.steps[number], np.asarray(selection.dropped_by)
    given_N = np.asarray((dropped_by == -1) | (dropped_by >= number), np.bool_)
    kept_n = np.asarray(dropped_by[given_N] != number, np.bool_)
    lengths = {len(kept_n), *(len(array) for array in step.rows.values())}
    if lengths != {step.rows_in} or int(kept_n.sum()) != step.rows_out:
        raise PoolError(
            f"the selection of {selection.pool} may be damaged: its step {number + 1} ({step.method}) says "
            f"{step.rows_out:,} of {step.rows_in:,} rows, but its arrays do not match"
        )
    return Judged(number, step, kept_n, given_N, dropped_by)


@dataclass(frozen=True)
class Reason:
    """Why rows were dropped: a reason of a step, its number of rows, and one example."""

    words: str
    count: int
    row: int
    example: str


def reasons(of: Judged) -> tuple[Reason, ...]:
    """Return the reasons that dropped rows, in the order of the step."""
    step = of.step
    if not step.reasons:
        return ()
    counts: dict[int, tuple[int, int]] = {}
    if "code" in step.rows:
        codes = np.asarray(step.rows["code"])
        counted = np.bincount(codes[~of.kept_n], minlength=len(step.reasons))
        counts = {
            c: (int(counted[c]), int(np.argmax(~of.kept_n & (codes == c)))) for c in np.flatnonzero(counted).tolist()
        }
    elif not of.kept_n.all():
        counts = {0: (int(np.count_nonzero(~of.kept_n)), int(np.argmin(of.kept_n)))}
    rows = []
    for code, (count, first) in counts.items():
        template = step.reasons[code] if code < len(step.reasons) else ""
        rows.append(Reason(worded(template, step.cut), count, int(of.ids(np.array([first]))[0]), step.why(first)))
    return tuple(rows)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Histogram of the scores of the rows given to a step, for kept and dropped rows.

    Attributes:
        edges: (B + 1,) bin edges; the cut is one of them.
        kept: (B,) rows kept.
        dropped: (B,) rows dropped.
        apart: Rows without a usable score.
        apart_kept: How many of these were kept.
        beyond: Rows outside the axis, which excludes extreme values.
        elsewhere: Rows that repeat a reference, if they have a separate histogram.
    """

    edges: Floats
    kept: Ints
    dropped: Ints
    apart: int
    apart_kept: int
    beyond: int
    elsewhere: int = 0


def histogram(of: Judged) -> Histogram | None:
    """Return the histogram of a step's scores; None if it has no usable score."""
    if "score" not in of.step.rows:
        return None
    scores, good = usable_scores(of.step)
    if not apart_from_reference(of.step):
        return _counted(scores, good, of.kept_n, of.step.cut)
    other = np.asarray(of.step.rows["reference"]) < 0
    counted = _counted(scores[other], good[other], of.kept_n[other], of.step.cut)
    return None if counted is None else replace(counted, elsewhere=int(np.count_nonzero(~other)))


def apart_from_reference(step: Step) -> bool:
    """Return whether the step has scores of its own in addition to the cosines with a reference."""
    return {"duplicate_of", "reference", "reference_cosine"} <= set(step.rows)


def _counted(scores: Array, good: Bools, kept_n: Bools, cut: float | None) -> Histogram | None:
    if not good.any():
        return None
    apart = ~good
    drawn = scores[good]
    low, high = _axis(drawn)
    cut = cut if cut is not None and np.isfinite(cut) else None
    if cut is not None and cut < low:
        low = cut if low - cut < high - low else low
    if cut is not None and cut > high:
        high = cut if cut - high < high - low else high
    bins = int(np.clip(np.sqrt(len(drawn)), 12, _BINS))
    if cut is None and 1 <= high - low < _BINS and (drawn == np.round(drawn)).all():
        low, high, bins = low - 0.5, high + 0.5, int(high - low) + 1  # integers, each at the center of a bin
    width = (high - low) / bins
    start = low
    if cut is not None and low <= cut <= high:
        start = cut - np.ceil(round((cut - low) / width, 6)) * width
        bins = int(np.ceil(round((high - start) / width, 6)))
    edges = np.asarray(start + width * np.arange(bins + 1), np.float64)
    edges[-1] = max(edges[-1], high)
    kept = np.histogram(scores[good & kept_n], edges)[0]
    dropped = np.histogram(scores[good & ~kept_n], edges)[0]
    return Histogram(
        edges=edges,
        kept=np.asarray(kept, np.int64),
        dropped=np.asarray(dropped, np.int64),
        apart=int(np.count_nonzero(apart)),
        apart_kept=int(np.count_nonzero(apart & kept_n)),
        beyond=len(drawn) - int(kept.sum()) - int(dropped.sum()),
    )


def _axis(drawn: Array) -> tuple[float, float]:
    low, high = float(drawn.min()), float(drawn.max())
    near, far = np.percentile(drawn[:: max(1, len(drawn) // _SAMPLED)].astype(np.float64), [0.1, 99.9])
    if high - low > 4 * (far - near) > 0:
        low, high = float(near), float(far)
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-6):
        pad = 0.01 * max(abs(low), 0.01)
        low, high = low - pad, high + pad
    return low, high


# --- clusters -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clusters:
    """A step's clusters.

    Attributes:
        size_K: Rows the step was given.
        kept_K: Rows kept.
        more: Other values of each cluster by name, such as quota and complexity.
        names: Names of the clusters, if they have any.
    """

    size_K: Ints
    kept_K: Ints
    more: Mapping[str, Array]
    names: tuple[str, ...] = ()

    @property
    def share_K(self) -> Floats:
        """(K,) share kept; NaN for empty clusters."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.kept_K / self.size_K, np.float64)

    @property
    def difficulty(self) -> str:
        """Value to plot the share against: complexity, else d_intra, else ""."""
        return next((name for name in ("complexity", "d_intra") if name in self.more), "")


def clusters(of: Judged) -> Clusters | None:
    """Return a step's clusters; None if it has none."""
    groups = of.step.groups
    if not groups and "cluster" not in of.step.rows:
        return None
    k = max((len(array) for array in groups.values()), default=0)
    size, kept = groups.get("size"), groups.get("kept")
    if size is None or kept is None:
        if "cluster" not in of.step.rows:
            return None
        labels = np.asarray(of.step.rows["cluster"])
        size = np.bincount(labels, minlength=k)
        kept = np.bincount(labels[of.kept_n], minlength=k)
    names = [name for name in _GROUP_ORDER if name in groups]
    names += sorted(set(groups) - {"size", "kept", "name", *names})
    more = {name: np.asarray(groups[name]) for name in names if np.asarray(groups[name]).ndim == 1}
    named = tuple(map(str, groups.get("name", ())))
    return Clusters(np.asarray(size, np.int64), np.asarray(kept, np.int64), more, named)


def extremes(groups: Clusters, count: int) -> tuple[list[int], list[int]]:
    """Return the most and the least pruned clusters, larger ones first on ties; the lists do not overlap."""
    filled = np.flatnonzero(groups.size_K > 0)
    share, size = groups.share_K[filled], groups.size_K[filled]
    most = filled[np.lexsort((filled, -size, share))]
    least = filled[np.lexsort((filled, -size, -share))]
    count = min(count, (len(filled) + 1) // 2)
    first = most[:count].tolist()
    return first, [j for j in least[:count].tolist() if j not in first]


# --- rows to show ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A row to show, with its score."""

    row: int
    score: float | int | None


@dataclass(frozen=True)
class Strip:
    """Rows shown side by side, all kept or all dropped."""

    title: str
    kept: bool
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Pair:
    """A dropped row and the row it repeats.

    ``of_kept``: whether the step kept that row; None if it is a row of a reference.
    """

    row: int
    of: int
    of_kept: bool | None
    cosine: float | None


def _scores(step: Step) -> Array:
    """Return the scores of a step, (n,) floats; integers, which some methods record, as float64."""
    scores = np.asarray(step.rows["score"])
    return scores if scores.dtype.kind == "f" else scores.astype(np.float64)


def usable_scores(step: Step, positions: Ints | slice = slice(None)) -> tuple[Array, Bools]:
    """Return the scores of some rows, and which of them are usable: finite, and not beyond what can be drawn."""
    scores = _scores(step)[positions]
    good = np.isfinite(scores)
    if scores.dtype == np.float64:
        good &= np.abs(scores) < _DRAWABLE
    if "duplicate_of" in step.rows:
        good &= scores > -1  # the first row of a cluster has no earlier row to compare with
    return scores, np.asarray(good, np.bool_)


def _tiles(of: Judged, positions: Ints) -> tuple[Tile, ...]:
    values: list[float | int | None] = [None] * len(positions)
    if "score" in of.step.rows:
        scores, good = usable_scores(of.step, positions)
        kind = int if "marks" in of.step.rows else float  # in a coreset: a number of epochs
        values = [kind(score) if fine else None for score, fine in zip(scores, good, strict=True)]
    return tuple(map(Tile, of.ids(positions).tolist(), values))


def _spread(positions: Ints, count: int) -> Ints:
    """Return ``count`` of the positions, evenly spaced, including both ends."""
    if len(positions) <= count:
        return positions
    return positions[np.unique(np.linspace(0, len(positions) - 1, count).round().astype(np.int64))]


def _best(values: Array, candidates: Ints, count: int) -> Ints:
    """Return the ``count`` candidates with the highest values, in descending order; ties go to the lower row."""
    if not len(candidates):
        return candidates
    with np.errstate(over="ignore"):  # values of others may be beyond the range of float32
        usable = np.nan_to_num(np.asarray(values[candidates], np.float32), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    chosen = np.flatnonzero(top(usable, min(count, len(usable))))
    return candidates[chosen[np.argsort(-usable[chosen], kind="stable")]]


def _highest(values: Array, candidates: Ints, count: int) -> Ints:
    """Return ``count`` candidates with the highest values; if more share the maximum, evenly spaced among those."""
    best = candidates[values[candidates] == values[candidates].max(initial=-np.inf)]
    return _spread(best, count) if len(best) >= count else _best(values, candidates, count)


def in_clusters(of: Judged, wanted: Sequence[int], count: int) -> dict[int, tuple[Strip, Strip]]:
    """Return kept and dropped rows of some clusters, evenly spaced over the scores of each cluster."""
    labels = of.step.rows.get("cluster")
    if labels is None or not wanted or not count:
        return {}
    labels = np.asarray(labels)
    mark = np.zeros(max(int(labels.max(initial=0)), *wanted) + 1, np.bool_)
    mark[list(wanted)] = True
    positions = np.flatnonzero(mark[labels])
    values = np.nan_to_num(-_scores(of.step)[positions]) if "score" in of.step.rows else positions
    positions = positions[np.lexsort((positions, values, labels[positions]))]
    by_cluster = {}
    for cluster in wanted:
        inside = positions[labels[positions] == cluster]
        kept = of.kept_n[inside]
        by_cluster[cluster] = (
            Strip("Kept", True, _tiles(of, _spread(inside[kept], count))),
            Strip("Dropped", False, _tiles(of, _spread(inside[~kept], count))),
        )
    return by_cluster


def strips(of: Judged, count: int) -> tuple[Strip, ...]:
    """Return example rows of a step without clusters: highest and lowest scores, or some for each reason."""
    if not count or "cluster" in of.step.rows:
        return ()
    shown = []
    if {"score", "code", "marks"} <= set(of.step.rows):
        scores, codes = _scores(of.step), np.asarray(of.step.rows["code"])
        for code, reason in enumerate(of.step.reasons):
            rows = np.flatnonzero(~of.kept_n & (codes == code))
            title = worded(reason, of.step.cut).partition(":")[0]
            shown.append(Strip(f"Dropped \u00b7 {title}", False, _tiles(of, _highest(scores, rows, count))))
        rows = np.flatnonzero(of.kept_n)
        shown.append(Strip("Kept, lowest scores", True, _tiles(of, _highest(-scores, rows, count))))
    elif "score" in of.step.rows:
        scores = _scores(of.step)
        for kept in (True, False):
            rows = np.flatnonzero(of.kept_n == kept)
            high = _best(scores, rows, count)
            low = np.setdiff1d(_best(-scores, rows, count), high)
            low = low[np.argsort(scores[low], kind="stable")]
            word = "Kept" if kept else "Dropped"
            shown += [Strip(f"{word}, highest scores", kept, _tiles(of, high))]
            shown += [Strip(f"{word}, lowest scores", kept, _tiles(of, low))]
    elif "code" in of.step.rows:
        codes = np.asarray(of.step.rows["code"])
        for code, reason in enumerate(of.step.reasons):
            rows = np.flatnonzero(~of.kept_n & (codes == code))
            title = worded(reason, of.step.cut)
            shown.append(Strip(f"Dropped \u00b7 {title}", False, _tiles(of, _spread(rows, count))))
        shown.append(Strip("Kept", True, _tiles(of, _spread(np.flatnonzero(of.kept_n), count))))
    return tuple(strip for strip in shown if strip.tiles)


def pairs(of: Judged, count: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Return the nearest duplicate pairs, and those nearest to the threshold; the two do not overlap.

    Only one pair per original is shown if there are enough others.
    """
    if not count or "duplicate_of" not in of.step.rows:
        return (), ()
    twins = np.asarray(of.step.rows["duplicate_of"])
    scores = _scores(of.step) if "score" in of.step.rows else np.zeros(len(twins), np.float32)
    near, far = _ends(scores, np.flatnonzero(~of.kept_n & (twins >= 0)), twins, count)

    def made(positions: Ints) -> tuple[Pair, ...]:
        kept = of.dropped_by[twins[positions]] != of.number
        return _paired(of, positions, twins, kept.tolist(), scores)

    return made(near), made(far)


def dropped(of: Judged, count: int, borderline: bool) -> Ints:
    """Return positions of rows that a step dropped, other than as repeats of another row.

    Args:
        of: The step.
        count: How many.
        borderline: Whether those with scores nearest to the cut come first, or those farthest from it; without a single
            cut, the rows are evenly spaced over the scores, or over the reasons and the rows.
    """
    step = of.step
    gone = ~of.kept_n
    for name in ("duplicate_of", "reference"):
        if name in step.rows:
            gone = gone & (np.asarray(step.rows[name]) < 0)
    rows = np.flatnonzero(gone)
    if "score" not in step.rows:
        codes = np.asarray(step.rows["code"])[rows] if "code" in step.rows else rows
        return _spread(rows[np.argsort(codes, kind="stable")], count)
    scores = _scores(step)
    if step.cut is None or not np.isfinite(step.cut):
        return _spread(rows[np.argsort(scores[rows], kind="stable")], count)
    with np.errstate(over="ignore", invalid="ignore"):  # values of others may be beyond the range
        far = np.abs(scores - step.cut)
    return _best(-far if borderline else far, rows, count)


@dataclass(frozen=True, eq=False)
class Repeats:
    """The rows that a step dropped because they repeat rows of a reference pool.

    Attributes:
        location: Location of the reference, as given.
        count: Number of dropped rows.
        rows: Number of reference rows that they repeat.
        cut: Cosine above which rows were dropped; None if the parameters do not determine it.
        histogram: Histogram of every row's largest cosine with the reference; None if these are the step's scores.
        near: The nearest pairs; the second row of each is in the reference.
        far: The pairs nearest to the threshold.
        originals: What the selection recorded about the second rows, by number: "row", "key", "caption".
    """

    location: str
    count: int
    rows: int
    cut: float | None
    histogram: Histogram | None
    near: tuple[Pair, ...]
    far: tuple[Pair, ...]
    originals: Mapping[int, Mapping[str, Any]]


def repeats(of: Judged, count: int) -> Repeats | None:
    """Return what a step dropped because of a reference, with ``count`` pairs at each end; None without a reference."""
    step = of.step
    if not {"reference", "reference_cosine"} <= set(step.rows):
        return None
    others, cosines = np.asarray(step.rows["reference"]), np.asarray(step.rows["reference_cosine"])
    rows = np.flatnonzero(others >= 0)
    cut = _reference_cut(step.parameters)
    near, far = _ends(cosines, rows, others, count) if count else (rows[:0], rows[:0])
    return Repeats(
        location=str(step.parameters.get("reference", "")),
        count=len(rows),
        rows=len(np.unique(others[rows])),
        cut=cut,
        histogram=_counted(cosines, np.isfinite(cosines), others < 0, cut) if apart_from_reference(step) else None,
        near=_paired(of, near, others, [None] * len(near), cosines),
        far=_paired(of, far, others, [None] * len(far), cosines),
        originals={int(others[i]): step.repeated(i) or {} for i in (*near.tolist(), *far.tolist())},
    )


def _reference_cut(parameters: Mapping[str, Any]) -> float | None:
    eps = parameters.get("reference_eps")
    eps = parameters.get("eps") if eps is None else eps
    return float(np.float32(1 - float(eps))) if isinstance(eps, (int, float)) and 0 <= eps <= 2 else None


def _ends(cosines: Array, rows: Ints, originals: Array, count: int) -> tuple[Ints, Ints]:
    """Return the rows with the highest cosines, and of the others those with the lowest."""
    near = _varied(_best(cosines, rows, 20 * count), originals, count)
    rows = rows[~np.isin(rows, near)]
    return near, _varied(_best(-cosines, rows, 20 * count), originals, count)


def _paired(
    of: Judged, positions: Ints, originals: Array, kept: Sequence[bool | None], cosines: Array
) -> tuple[Pair, ...]:
    values = [float(v) if np.isfinite(v) else None for v in cosines[positions]]
    return tuple(map(Pair, of.ids(positions).tolist(), originals[positions].tolist(), kept, values))


def _varied(positions: Ints, twins: Array, count: int) -> Ints:
    first = np.zeros(len(positions), np.bool_)
    first[np.unique(twins[positions], return_index=True)[1]] = True
    order = np.argsort(~first, kind="stable")[:count]
    return positions[np.sort(order)]
