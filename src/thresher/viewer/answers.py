"""What the page asks for, as JSON values and arrays: pure functions of the subject."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from thresher.errors import UsageError
from thresher.io.paths import relative
from thresher.pool.store import EmbeddingStore, missing
from thresher.report import facts
from thresher.report.compare import compare
from thresher.report.examples import read_rows
from thresher.report.explain import duplicates, explain, history
from thresher.report.facts import plain
from thresher.selection import Selection
from thresher.viewer.cuts import command, python, sliders
from thresher.viewer.pictures import Pictures
from thresher.viewer.sets import Wanted, rows_of, scored_step
from thresher.viewer.subject import Cut, Subject

Array = npt.NDArray[Any]

MOST_ROWS = 240  # of a page
_CAPTION = 320  # characters of a caption in a gallery
NONE = 255  # code of a row without a colour
_LEVELS = 254  # of a scale of colours


# --- the subject ----------------------------------------------------------------------------------


def subject_of(subject: Subject, pictures: Pictures) -> dict[str, Any]:
    """Return what there is to look at."""
    return {
        "title": subject.title,
        "sources": [
            {
                "name": plain(relative(store.layout.location), 200),
                "rows": store.total,
                "pictures": pictures.has(i),
                "captions": store.layout.caption is not None,
                "keys": store.layout.key is not None,
                "vectors": bool(store.layout.vectors),
            }
            for i, store in enumerate(subject.stores)
        ],
        "columns": [asdict(column) for column in subject.columns],
        "selections": [
            {
                "name": one.name,
                "clusters": any("cluster" in step.rows for step in one.selection.steps),
                **chain_of(one.selection),
                "sliders": [asdict(slider) for slider in sliders(one.selection)],
            }
            for one in subject.selections
        ],
        "runs": [{"name": run.name, "source": run.source} for run in subject.runs],
        "out": None if subject.out is None else relative(str(subject.out)),
    }


def chain_of(selection: Selection) -> dict[str, Any]:
    """Return the counts and the steps of a selection."""
    return {
        "rows": selection.total,
        "kept": len(selection),
        "uses": selection.uses,
        "steps": [
            {
                "method": step.method,
                "short": plain(facts.in_short(step.header()), 160),
                "rows_in": step.rows_in,
                "rows_out": step.rows_out,
                "reasons": [plain(facts.worded(reason, step.cut), 200) for reason in step.reasons],
                "score": plain(step.score, 80),
                "cut": finite(step.cut),
                "scored": "score" in step.rows,
                "notes": [plain(note, 300) for note in step.notes[:12]],
            }
            for step in selection.steps
        ],
    }


def finite(value: Any) -> float | None:
    """Return a number as JSON has it; None for NaN and infinities."""
    return None if value is None or not np.isfinite(value) else float(value)


def cut_of(subject: Subject, number: int, cut: Cut | None) -> tuple[dict[str, Any], Array]:
    """Return the counts of a cut, and the step that dropped each row, (N,) int8, -1 for kept rows."""
    selection = subject.selection(number, cut)
    result = {**chain_of(selection), "sliders": [asdict(slider) for slider in sliders(selection)]}
    return result, np.minimum(selection.dropped_by, 126).astype(np.int8)


def command_of(subject: Subject, number: int, cut: Cut | None, name: str) -> dict[str, str]:
    """Return the command that makes a selection, "" if there is none, and how to make it in Python."""
    selection = subject.selection(number, cut)
    target = name if subject.out is None else str(subject.out / name)
    path = subject.selections[number].path or "selection"
    return {"command": command(selection, target), "python": python(path, cut, target)}


def histogram_of(subject: Subject, number: int, cut: Cut | None, step: int) -> dict[str, Any] | None:
    """Return the histogram of the scores of a step, None if it has no scores."""
    selection = subject.selection(number, cut)
    if not 0 <= step < len(selection.steps):
        raise UsageError(f"step {step + 1}: there are {len(selection.steps)}")
    made = facts.histogram(facts.judge(selection, step))
    if made is None:
        return None
    return {
        "edges": made.edges.tolist(),
        "kept": made.kept.tolist(),
        "dropped": made.dropped.tolist(),
        "apart": made.apart,
        "beyond": made.beyond,
        "cut": finite(selection.steps[step].cut),
        "label": plain(selection.steps[step].score, 80) or "score",
    }


# --- rows -----------------------------------------------------------------------------------------


def page_of(
    subject: Subject, pictures: Pictures, wanted: Wanted, source: int, start: int, count: int
) -> dict[str, Any]:
    """Return some rows of a set, in its order, with what is known about each.

    Raises:
        UsageError: The set refers to something that there is not.
    """
    ids = rows_of(subject, wanted, source)
    rows = ids[max(start, 0) : max(start, 0) + min(max(count, 0), MOST_ROWS)].tolist()
    result = {"total": len(ids), "start": start, "rows": rows_with(subject, pictures, rows, source, wanted)}
    return result


def rows_with(
    subject: Subject, pictures: Pictures, rows: Sequence[int], source: int, wanted: Wanted | None = None
) -> list[dict[str, Any]]:
    """Return what is known about rows, in their order."""
    store = subject.store(source)
    made: dict[int, dict[str, Any]] = {row: {"row": row} for row in rows}
    if wanted is not None and wanted.selection is not None and source == 0:
        selection = subject.selection(wanted.selection, wanted.cut)
        _judge(subject, selection, wanted, made)
    twins = [one["twin"]["row"] for one in made.values() if one.get("twin")]
    texts = read_texts(store, {*rows, *twins})
    for row, one in made.items():
        one |= texts[row]
        if one.get("twin"):
            one["twin"] |= texts[one["twin"]["row"]]
    pictures.expect(source, list(dict.fromkeys([*rows, *twins])))
    return [made[row] for row in rows]


def read_texts(store: EmbeddingStore, rows: set[int]) -> dict[int, dict[str, str]]:
    """Return key and caption of rows, by row."""
    found = read_rows(store, rows, images=False, caption=_CAPTION)
    return {one.row: {"key": one.key if store.layout.key else str(one.row), "caption": one.caption} for one in found}


def _judge(subject: Subject, selection: Selection, wanted: Wanted, made: Mapping[int, dict[str, Any]]) -> None:
    """Add to each row what the selection decided about it."""
    rows = np.array(list(made), np.int64)
    by = np.asarray(selection.dropped_by)[rows]
    labels = subject.labels(wanted.selection or 0, wanted.clustered)
    try:
        scores = subject.scores(wanted.selection or 0, wanted.cut, scored_step(subject, wanted))[rows]
    except UsageError:
        scores = np.full(len(rows), np.nan, np.float32)
    uses = None if selection.repeats is None else np.asarray(selection.repeats)[rows]
    for i, row in enumerate(rows.tolist()):
        made[row] |= {"step": int(by[i]), "score": finite(scores[i])}
        if labels is not None and labels[row] >= 0:
            made[row]["cluster"] = int(labels[row])
        if uses is not None and uses[i] > 1:
            made[row]["uses"] = int(uses[i])
    for number in np.unique(by[by >= 0]).tolist():
        step, here = selection.steps[number], rows[by == number]
        at = np.searchsorted(selection.given(number), here)
        for row, reason in zip(here.tolist(), step.why_each(at), strict=True):
            made[row]["reason"] = plain(reason, 300)
        if "duplicate_of" not in step.rows:
            continue
        twins = np.asarray(step.rows["duplicate_of"])[at]
        for row, twin in zip(here.tolist(), twins.tolist(), strict=True):
            if twin >= 0:
                made[row]["twin"] = {"row": twin, "kept": bool(selection.dropped_by[twin] == -1)}


def explained(subject: Subject, pictures: Pictures, row: int, number: int | None, cut: Cut | None) -> dict[str, Any]:
    """Return what ``thresher explain`` says of a row, and the rows that it repeats, up to the one that stayed.

    Raises:
        UsageError: There is no such row.
    """
    store = subject.store(0)
    if not 0 <= row < store.total:
        raise UsageError(f"row {row:,}: the pool has {store.total:,} rows")
    if number is None:
        return {"row": row, **read_texts(store, {row})[row], "steps": [], "chain": []}
    selection = subject.selection(number, cut)
    result: dict[str, Any] = clean(explain(selection, store, f"row:{row}"))
    by = int(selection.dropped_by[row])
    chain = duplicates(selection, by, row)[:12] if by >= 0 and "duplicate_of" in selection.steps[by].rows else []
    texts = read_texts(store, {*chain})
    result["chain"] = [{"row": one, "kept": bool(selection.dropped_by[one] == -1), **texts[one]} for one in chain]
    pictures.expect(0, [row, *chain])
    return result


def explained_by_run(subject: Subject, pictures: Pictures, row: int, run: int) -> dict[str, Any]:
    """Return what ``thresher explain`` says of a row of a training run.

    Raises:
        UsageError: There is no such run or row.
    """
    if not 0 <= run < len(subject.runs):
        raise UsageError(f"run {run}: there are {len(subject.runs)}")
    one = subject.runs[run]
    if one.source is None:
        raise UsageError(f"the pool of this run is not open: {one.why}")
    store = subject.store(one.source)
    if not 0 <= row < store.total:
        raise UsageError(f"row {row:,}: the pool has {store.total:,} rows")
    pictures.expect(one.source, [row])
    said: dict[str, Any] = clean(history(one.training, store, f"row:{row}"))
    return said


def clean(value: Any) -> Any:
    """Return a result with texts on one line and without NaN, as JSON values."""
    if isinstance(value, str):
        return plain(value, 2_000)
    if isinstance(value, Mapping):
        return {str(name): clean(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(one) for one in value]
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    return finite(value) if isinstance(value, float) else value


def caption_of(store: EmbeddingStore, row: int, most: int) -> str:
    """Return the caption of a row as it is, up to a number of characters.

    Raises:
        UsageError: There is no such row.
    """
    from thresher.pool.layout import texts

    if not 0 <= row < store.total:
        raise UsageError(f"row {row:,}: the pool has {store.total:,} rows")
    if not store.layout.caption:
        return ""
    part = next(iter(store.lookup([store.layout.caption], np.array([row]))))
    return texts(part.column(0), most)[0]


# --- colours --------------------------------------------------------------------------------------


def colours_of(subject: Subject, by: str, number: int | None, cut: Cut | None) -> tuple[dict[str, Any], Array]:
    """Return a legend, and the code of the colour of every row, (N,) uint8, 255 for none.

    Args:
        subject: What is looked at.
        by: "score", "cluster", or "column:NAME".
        number: The selection.
        cut: Another cut of it.

    Raises:
        UsageError: There is nothing of this name.
    """
    if by == "score":
        if number is None:
            raise UsageError("scores need a selection")
        step = scored_step(subject, Wanted(selection=number))
        label = subject.selection(number).steps[step].score
        return _scale(subject.scores(number, cut, step), plain(label, 80) or "score")
    if by == "cluster":
        labels = None if number is None else subject.labels(number)
        if labels is None:
            raise UsageError("there are no clusters")
        codes = np.where(labels < 0, NONE, labels % _LEVELS).astype(np.uint8)
        return {"kind": "clusters", "label": "cluster", "count": int(labels.max(initial=-1)) + 1}, codes
    kind, _, name = by.partition(":")
    if kind != "column":
        raise UsageError(f"by = {by[:40]!r}: give score, cluster or column:NAME")
    column = subject.column(name)
    if column.kind == "text":
        values = subject.values(name)
        names = [plain(value, 40) or "(empty)" for value in values.names]
        codes = np.where(values.codes_N == len(names), NONE, values.codes_N).astype(np.uint8)
        return {"kind": "names", "label": plain(name, 60), "names": names, "more": values.more}, codes
    if column.kind == "flag":
        flags = subject.numbers(name)
        codes = (np.ma.getdata(flags) == 1).astype(np.uint8)
        codes[missing(flags)] = NONE
        return {"kind": "names", "label": plain(name, 60), "names": ["false", "true"], "more": 0}, codes
    return _scale(subject.numbers(name), plain(name, 60))


def _scale(values: Array, label: str) -> tuple[dict[str, Any], Array]:
    seen = _floats(values[:: max(1, len(values) // 200_000)])
    seen = seen[np.isfinite(seen)]
    # Halves, here and below: the difference of two numbers may be too large for float64.
    low, high = (2 * np.percentile(seen / 2, [0.5, 99.5])).tolist() if len(seen) else (0.0, 1.0)
    if high / 2 == low / 2:
        high = min(max(low + 1, math.nextafter(low, math.inf)), sys.float_info.max)
    span = (high / 2 - low / 2) or 1.0
    codes = np.full(len(values), NONE, np.uint8)
    for at in range(0, len(values), 2**20):  # in parts, so that little memory is used
        part = _floats(values[at : at + 2**20])
        good = ~np.isnan(part)
        levels = np.clip((part[good] / 2 - low / 2) / span, 0, 1) * (_LEVELS - 1)
        codes[at : at + 2**20][good] = levels.round().astype(np.uint8)
    return {"kind": "scale", "label": label, "low": low, "high": high, "levels": _LEVELS}, codes


def _floats(values: Array) -> npt.NDArray[np.float64]:
    """Return numbers as float64, NaN for nulls."""
    return np.asarray(np.ma.filled(values.astype(np.float64), np.nan))


# --- clusters and comparisons ---------------------------------------------------------------------


def clusters_of(subject: Subject, number: int, cut: Cut | None, clustered: int | None) -> dict[str, Any] | None:
    """Return the clusters of a step: sizes, rows kept by the whole chain, and more; None if there are none.

    Args:
        subject: What is looked at.
        number: The selection.
        cut: Another cut of it.
        clustered: The step (default: the one that clustered the most rows).
    """
    selection = subject.selection(number, cut)
    having = [i for i, step in enumerate(selection.steps) if "cluster" in step.rows]
    if not having:
        return None
    step = max(having, key=lambda i: (selection.steps[i].rows_in, -i)) if clustered is None else clustered
    labels = subject.labels(number, step)
    groups = facts.clusters(facts.judge(selection, step))
    if labels is None or groups is None:
        return None
    inside, k = labels >= 0, len(groups.size_K)

    def kept_by(one: Selection) -> list[int]:
        counts: list[int] = np.bincount(labels[inside & (np.asarray(one.dropped_by) == -1)], minlength=k).tolist()
        return counts

    return {
        "step": step,
        "steps": [{"step": i, "name": f"{i + 1}. {selection.steps[i].method}"} for i in having],
        "size": groups.size_K.tolist(),
        "kept": kept_by(selection),
        "before": kept_by(subject.selection(number)) if cut is not None else None,
        "more": {name: [finite(one) for one in np.asarray(values).tolist()] for name, values in groups.more.items()},
        "names": [plain(name, 60) for name in groups.names],
        # Of the selection as it was, so that they stay while the cut moves.
        "examples": subject.kept.get(
            ("examples", number, step), lambda: _examples(subject.selection(number), labels, k)
        ),
    }


def _examples(selection: Selection, labels: Array, k: int, each: int = 5) -> list[list[int]]:
    """Return a few rows of each cluster, kept ones first, evenly spaced over its rows."""
    order = np.lexsort((np.asarray(selection.dropped_by) != -1, labels))
    order = order[labels[order] >= 0]
    ends = np.searchsorted(labels[order], np.arange(k + 1))
    dropped = (np.asarray(selection.dropped_by) != -1)[order]
    rows = []
    for j in range(k):
        here = slice(int(ends[j]), int(ends[j + 1]))
        inside, count = order[here], int(np.count_nonzero(~dropped[here]))
        inside = inside[:count] if count else inside
        at = np.unique(np.linspace(0, len(inside) - 1, min(each, len(inside))).round().astype(np.int64))
        rows.append(inside[at].tolist())
    return rows


def comparison_of(subject: Subject) -> dict[str, Any]:
    """Return what the selections have in common.

    Raises:
        UsageError: There are none.
    """
    subject.selection(0)
    selections = {str(i): one.selection for i, one in enumerate(subject.selections)}
    steps = [[step.rows_in for step in one.selection.steps if "cluster" in step.rows] for one in subject.selections]
    clustered = max(range(len(steps)), key=lambda i: (max(steps[i], default=0), -i))
    result = dict(compare(selections, subject.labels(clustered), worst=40))
    masks = [one.selection.mask() for one in subject.selections]
    count = np.zeros(len(masks[0]), np.uint8)
    for mask in masks:
        count += mask
    return {
        **result,
        "clustered": clustered,
        "only": [int(np.count_nonzero(mask & (count == 1))) for mask in masks],
        "all": int(np.count_nonzero(count == len(masks))),
        "none": int(np.count_nonzero(count == 0)),
    }


def covariance_of(subject: Subject) -> dict[str, Any]:
    """Return how well each selection preserves the image-text cross-covariance of the pool.

    Raises:
        UsageError: There are no selections, or the pool has no image and text embeddings of one space.
    """
    subject.selection(0)
    from thresher.pruning.covariance import covariance_errors
    from thresher.pruning.run import Run
    from thresher.report.compare import clusters_of as labels_of
    from thresher.runtime.engine import make_engine

    chosen = {str(i): one.selection for i, one in enumerate(subject.selections)}
    run = Run(subject.store(0), next(iter(chosen.values())), make_engine(), subject.cache)
    errors = covariance_errors(run, chosen, labels_of(list(chosen.values())))
    result: dict[str, Any] = clean({name: error.header(5) for name, error in errors.items()})
    return result
