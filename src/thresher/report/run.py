"""The report on a training run: what was left out, epoch by epoch, and what it did to the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thresher import __version__
from thresher.dynamic.run_folder import Training
from thresher.errors import UsageError
from thresher.pool.store import EmbeddingStore
from thresher.report import curves
from thresher.report.epochs import Epochs, Group, groups, settled
from thresher.report.examples import Example, look_up
from thresher.report.facts import number, plain
from thresher.report.pages import rendered
from thresher.runtime.files import writing
from thresher.runtime.format import duration, percent

_OPEN = 60  # epochs up to which their table is shown open
_COLUMNS = {
    "rows": "rows",
    "pruned_so_far": "pruned so far",
    "loss": "mean loss",
    "redundant": "redundant",
    "ill_matched": "ill-matched",
    "candidates": "candidates",
    "overlap": "found again",
    "seconds": "seconds",
    "samples_per_second": "samples/s",
    "lr": "rate",
}
_TOLD = {
    "kept": "Rows trained on and left out.",
    "pruned": "Share of the samples left out, from the first epoch on.",
    "candidates": "Candidates for pruning, by the epoch that looked for them. A row may be redundant in one direction "
    "and ill-matched in the other.",
    "overlap": "Candidates that the search before had found as well. Near the dashed line they come by chance.",
    "loss": "Mean loss of the rows trained on. Epochs on everything do not compare with epochs on a part: that leaves "
    "out the highest or lowest losses, and the rows of a batch are each other's negatives.",
    "histogram": "Losses of the rows trained on: each column is an epoch, darker where more of its rows lie.",
    "seconds": "Seconds of training, evaluations not counted.",
    "speed": "Samples trained on in a second.",
}


def write_run_report(
    training: Training,
    target: str | os.PathLike[str],
    *,
    store: EmbeddingStore | None = None,
    title: str | None = None,
    examples: int = 6,
) -> Path:
    """Write the story of a training run as one HTML file and return its path.

    The page loads nothing: charts and pictures are inside it. The same run gives the same bytes.

    Args:
        training: A run, finished or not.
        target: The file; replaced as a whole or not at all.
        store: The run's pool, see :meth:`Training.open_pool`, for captions and pictures; without it there are only
            numbers.
        title: Heading; the run's folder by default.
        examples: Rows shown side by side; 0 shows none.

    Raises:
        UsageError: The store has other rows than the run's pool, or a negative number.
        PoolError: The run's folder or the pool is damaged.
        OutputError: The file cannot be written.
    """
    if examples < 0:
        raise UsageError(f"examples = {examples}: 0 or more")
    if store is not None and store.total != training.rows:
        raise UsageError(f"a pool of {store.total:,} rows for a run on {training.rows:,}; open it with open_pool()")
    log = training.log()
    found = Epochs.of(log)
    shown_groups: tuple[Group, ...] = ()
    if len(found) and store is not None:
        shown_groups = groups(training.ledger(), examples)
    shown = look_up(store, [row.row for group in shown_groups for row in group.rows]) if store is not None else {}
    page = _render(training, log, found, shown_groups, shown, title)
    with writing(target) as scratch:
        # A path may hold bytes that are no text; the page must not fail for them.
        Path(scratch).write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return Path(target)


@dataclass(frozen=True)
class _Metric:
    """A line of the table of evaluations."""

    of: str
    name: str
    first: str
    last: str
    best: str
    when: str


def _render(
    training: Training,
    log: Sequence[Mapping[str, Any]],
    found: Epochs,
    shown_groups: tuple[Group, ...],
    shown: Mapping[int, Example],
    title: str | None,
) -> str:
    from markupsafe import Markup

    drawn = curves.charts(found, training.promised) if len(found) else {}
    evaluations = [
        (name, curves.evaluation(f"eval-{i}", plain(name, 80), measured))
        for i, (name, measured) in enumerate(found.evals.items(), 1)
    ]
    name = plain(os.path.basename(os.path.abspath(training.folder)), 80)
    return rendered(
        "run.html.jinja",
        title=plain(title or f"Training run {name}", 200),
        training=training,
        unfinished=training.unfinished(log),
        facts=_facts(training, found),
        pruned=float(found["pruned_so_far"][-1]) if len(found) else 0.0,
        epochs=len(found),
        policy=_policy(training),
        # Made here from numbers, with every word in them escaped by the drawing library.
        charts=[(name, Markup(drawn[name]), _TOLD[name]) for name in _TOLD if name in drawn],
        evaluations=[(name, Markup(drawing)) for name, drawing in evaluations if drawing],
        metrics=_metrics(found),
        columns=[title for name, title in _COLUMNS.items() if _has(found, name)],
        table=_table(found),
        opened=len(found) <= _OPEN,
        groups=shown_groups,
        shown=shown,
        pictures=any(example.picture for example in shown.values()),
        settings={key: _value(value) for key, value in training.settings.items() if value not in (None, [], {})},
        header=json.dumps(
            {key: value for key, value in vars(training).items() if key != "folder"}, indent=2, ensure_ascii=False
        ),
        version=__version__,
    )


def _facts(training: Training, found: Epochs) -> list[tuple[str, str]]:
    """Return the run in a few numbers."""
    told = [("Policy", _policy(training)), ("Epochs", number(len(found)))]
    asked = {"Model": "model", "Batch": "batch_size", "Peak rate": "lr", "Seed": "seed"}
    told += [
        (name, str(training.settings[key])) for name, key in asked.items() if training.settings.get(key) is not None
    ]
    if not len(found):
        return told
    seen, (left_out, saved) = int(np.nansum(found["samples"])), found.saved
    told.append(("Samples seen", number(seen)))
    share = f", {percent(left_out, float(np.nansum(found['total'])))}" if left_out > 0 else ""
    promised = "" if training.promised is None else f"; {training.promised:.1%} promised over the run"
    told.append(("Left out", f"{number(int(left_out))} samples{share}{promised}"))
    seconds = float(found["seconds"].sum())
    if np.isfinite(seconds):
        about = f"; about {duration(saved)} saved, at the speed of the rest" if saved > 0 else ""
        told.append(("Training", f"{duration(seconds)}{about}"))
    return told


def _policy(training: Training) -> str:
    prune = "" if training.promised is None else f", {training.promised:.1%} to be pruned"
    return plain(f"{training.policy}{prune}", 160)


def _has(found: Epochs, name: str) -> bool:
    """Whether a column says anything."""
    if name in ("redundant", "ill_matched", "candidates"):
        return bool(np.nansum(found[name]))
    return bool(np.isfinite(found[name]).any())


def _table(found: Epochs) -> list[tuple[int, str, list[str]]]:
    """Return a line for each epoch: number, phase, cells."""
    names = [name for name in _COLUMNS if _has(found, name)]
    return [
        (int(found.number_E[e]), plain(found.phases[e], 40), [_cell(name, found, e) for name in names])
        for e in range(len(found))
    ]


def _cell(name: str, found: Epochs, e: int) -> str:
    value = float(found[name][e])
    if np.isnan(value) or (name in ("redundant", "ill_matched", "candidates") and not value):
        return "-"
    if name in ("pruned_so_far", "overlap"):
        return f"{value:.1%}"
    if name == "lr":
        return f"{value:.2e}"
    if name == "seconds":
        return f"{value:,.1f}"
    return number(value) if name == "loss" else f"{value:,.0f}"


def _metrics(found: Epochs) -> list[_Metric]:
    told = []
    for name, measured in found.evals.items():
        for curve in measured:
            if settled(curve.metric):
                ends = (number(curve.values[-1]),) * 2
                told.append(_Metric(plain(name, 60), plain(curve.metric, 60), "", ends[1], "", ""))
                continue
            best = curve.best
            told.append(
                _Metric(
                    plain(name, 60),
                    plain(curve.metric, 60),
                    number(curve.values[0]),
                    number(curve.values[-1]),
                    number(curve.values[best]),
                    f"epoch {curve.epochs[best]}",
                )
            )
    return told


def _value(value: Any) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 300)
